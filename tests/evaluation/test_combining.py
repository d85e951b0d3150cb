"""Weights and thresholds from scored pairs: nothing is chosen on what it is reported on."""

from __future__ import annotations

import numpy as np
import pytest

from memscan.config import MetricConfig
from memscan.evaluation.combining import FOLDS, Scored, cross_validated, fit, folded
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


def test_unseen_scores_are_by_models_without_the_pairs_concept() -> None:
    """A pair that contradicts all others cannot have taught the model that scores it, and has moved nothing."""
    scored = pairs(2, signal=1)
    fitted = fit(scored, *TERMS)
    changed = [*scored[:-1], Scored(**{**vars(scored[-1]), "truth": Label.VM})]
    again = fit(changed, *TERMS)
    same = [one == other for one, other in zip(fitted.unseen, again.unseen, strict=True)]
    own = [pair.concept == scored[-1].concept for pair in scored]
    assert fitted.strengths == again.strengths
    assert all(equal for equal, mine in zip(same, own, strict=True) if mine)
    assert not all(same)


def test_figures_of_what_can_be_told_and_of_what_cannot() -> None:
    told = cross_validated(pairs(3, signal=1), CONFIG, TERMS)
    assert told["macro_f1"] > 0.95
    assert told["areas"].keys() == {"0%-10%", "10%-20%", "20%-35%", "35%-50%", "50%-70%", "70%-100%"}
    assert sum(one["total"] for one in told["areas"].values()) == told["total"] == 140
    # 140 pairs of pure noise: whatever is chosen inside, held-out concepts are not told apart.
    assert cross_validated(pairs(4, signal=0), CONFIG, TERMS)["macro_f1"] < 0.5
    assert told["strata"]["s"]["macro_f1"] == pytest.approx(told["macro_f1"])
