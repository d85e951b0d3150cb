"""Weights and thresholds from scored pairs: nothing is chosen on what it is reported on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memscan.config import MetricConfig
from memscan.evaluation.combining import FOLDS, STRENGTHS, Scored, cross_validated, fit, folded
from memscan.records import Label

CONFIG = MetricConfig(variant="region", canvas=128, foreground_threshold=0.5, background_threshold=0.5)
TERMS = (["front", "noise"], ["back", "noise"])
LABELS = (Label.VM, Label.FM, Label.BM, Label.NM, Label.NM, Label.NM, Label.NM)


def pairs(seed: int, *, signal: float) -> list[Scored]:
    """Twenty concepts with seven pairs each; terms follow the truth by `signal`."""
    rng = np.random.default_rng(seed)
    found = []
    for concept in range(20):
        for number, truth in enumerate(LABELS):
            copied = truth in (Label.VM, Label.FM), truth in (Label.VM, Label.BM)
            front, back = (signal * one + rng.normal(0, 0.1) for one in copied)
            terms = {"front": front, "back": back, "noise": rng.normal()}
            area = (concept + 0.5) / 20
            found.append(Scored(f"g{concept}-{number}", f"c{concept}", truth, "s", True, terms, (), area))
    return found


def test_concepts_never_lie_in_two_folds() -> None:
    scored = pairs(1, signal=1)
    folds = folded(scored, 3)
    assert set(folds.tolist()) == set(range(FOLDS))
    by_concept: dict[str, set[int]] = {}
    for pair, fold in zip(scored, folds.tolist(), strict=True):
        by_concept.setdefault(pair.concept, set()).add(fold)
    assert all(len(one) == 1 for one in by_concept.values())


def test_the_strongest_regularisation_that_does_as_well_is_taken() -> None:
    assert set(fit(pairs(2, signal=1), *TERMS).strengths) == {STRENGTHS[0]}
    # A term in other units is out of reach of strong regularisation, and the noise is not: a weaker one is needed.
    small = [replace(pair, terms={**pair.terms, "front": pair.terms["front"] / 30}) for pair in pairs(2, signal=1)]
    first, second = fit(small, *TERMS).strengths
    assert first > second == STRENGTHS[0]


def test_figures_of_what_can_be_told_and_of_what_cannot() -> None:
    told = cross_validated(pairs(3, signal=1), CONFIG, TERMS)
    assert told["macro_f1"] > 0.95
    assert told["areas"].keys() == {"0%-10%", "10%-20%", "20%-35%", "35%-50%", "50%-70%", "70%-100%"}
    assert sum(one["total"] for one in told["areas"].values()) == told["total"] == 140
    # 140 pairs of pure noise: whatever is chosen inside, held-out concepts are not told apart.
    assert cross_validated(pairs(4, signal=0), CONFIG, TERMS)["macro_f1"] < 0.5
    assert told["strata"]["s"]["macro_f1"] == pytest.approx(told["macro_f1"])
