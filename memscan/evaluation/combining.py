"""This module fits weights and thresholds on scored real pairs, and cross-validates them by concept.

What a census takes is the most severe of a generation's candidates, so operating points are chosen by generation: they
maximise macro-F1 among those under which no unmemorised generation of the fitting rows has a label. Concepts (what is
in the picture) never lie in two folds. Ambiguous pairs take no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logit
from sklearn.linear_model import LogisticRegression

from memscan.config import MetricConfig
from memscan.errors import MemscanError
from memscan.metric.calibration import Calibration, calibrate
from memscan.metric.combination import Models, RegionModel
from memscan.metric.decision import SEVERITY, label_of
from memscan.metric.labelled import Judged, figures
from memscan.records import Label

FOLDS = 5
# Of the logistic models: few pairs are FM or BM, so the terms are held close to equal weights.
REGULARISATION = 0.1
MOST = 0.05  # upper limit of the false positives' interval that an operating point may have: none of some 90 has .034

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """One pair with what was measured of it.

    Attributes:
        concept: of the reference; the fold's unit.
        stratum: for tables.
        labelled: False for a candidate that only a search found; it is NM, and counts by generation only.
        terms: by name.
        missing: regions that the pair does not have.
    """

    generated: str
    concept: str
    truth: Label
    stratum: str
    labelled: bool
    terms: Mapping[str, float]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Operating:
    """This holds models of both regions, or single terms, with the thresholds chosen for them."""

    models: Models | None
    terms: tuple[str, str]
    config: MetricConfig

    def scores(self, pair: Scored) -> tuple[float, float]:
        """Return the foreground and background score of a pair."""
        if self.models is None:
            return pair.terms[self.terms[0]], pair.terms[self.terms[1]]
        return self.models.foreground.score(pair.terms), self.models.background.score(pair.terms)

    def label(self, pair: Scored) -> Label:
        """Return the label of a pair."""
        return label_of(*self.scores(pair), self.config, pair.missing)


def fit(pairs: Sequence[Scored], foreground: Sequence[str], background: Sequence[str]) -> Models:
    """Return a logistic model per region on the pairs that have it; copies and others weigh the same."""
    return Models(
        _fitted(pairs, foreground, "foreground", (Label.VM, Label.FM)),
        _fitted(pairs, background, "background", (Label.VM, Label.BM)),
    )


def _fitted(pairs: Sequence[Scored], names: Sequence[str], region: str, copied: Sequence[Label]) -> RegionModel:
    used = [pair for pair in pairs if region not in pair.missing]
    terms_NT = np.array([[pair.terms[name] for name in names] for pair in used])
    model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=2000)
    model.fit(terms_NT, [pair.truth in copied for pair in used])
    weights = dict(zip(names, model.coef_[0].tolist(), strict=True))
    return RegionModel(float(model.intercept_[0]), weights)


def operate(
    pairs: Sequence[Scored], chosen: Operating, source: str, most: float = MOST
) -> tuple[Operating, Calibration]:
    """Return thresholds by generation, over all its candidates; see `calibrate`."""
    by_generation: dict[str, list[Scored]] = {}
    for pair in pairs:
        by_generation.setdefault(pair.generated, []).append(pair)
    widest = max(map(len, by_generation.values()))
    scores = np.full((2, len(by_generation), widest), np.nan)
    truth = []
    for row, candidates in enumerate(by_generation.values()):
        truth.append(max((pair.truth for pair in candidates), key=lambda label: SEVERITY[label]))
        for column, pair in enumerate(candidates):
            scores[:, row, column] = _as_judged(chosen.scores(pair), pair.missing)
    calibration = calibrate(
        scores[0],
        scores[1],
        truth,
        config=chosen.config,
        source=source,
        models={"segmenter": "isnet-general-use fp16, 1024 px"},
        max_false_positive_rate=most,
    )
    return replace(chosen, config=calibration.apply(chosen.config)), calibration


def _as_judged(scores: tuple[float, float], missing: Sequence[str]) -> tuple[float, float]:
    """Scores for `calibrate`, which knows no missing regions: no foreground never fires, no background has its."""
    foreground, background = (min(1.0, max(0.0, score)) for score in scores)
    if "foreground" in missing:
        return 0.0, background
    return (foreground, foreground) if "background" in missing else (foreground, background)


def centred(models: Models, config: MetricConfig) -> Models:
    """Return the models with their operating point moved to a score of .5 in both regions."""
    moved = [
        replace(model, intercept=float(model.intercept - logit(threshold)))
        for model, threshold in (
            (models.foreground, config.foreground_threshold),
            (models.background, config.background_threshold),
        )
    ]
    return Models(*moved)


def cross_validated(
    pairs: Sequence[Scored], config: MetricConfig, terms: tuple[Sequence[str], Sequence[str]], seed: int = 0
) -> dict[str, Any]:
    """Return figures of pairs that were judged by what other concepts chose; by pair, generation and stratum.

    Args:
        terms: of the foreground and background; one each takes the term as the score, several are fitted.
        seed: of the order in which concepts are dealt to folds.
    """
    concepts = sorted({pair.concept for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(concepts))
    fold = {concepts[concept]: place % FOLDS for place, concept in enumerate(order.tolist())}
    judged: list[tuple[Scored, Judged]] = []
    for held in range(FOLDS):
        others = [pair for pair in pairs if fold[pair.concept] != held]
        single = len(terms[0]) == len(terms[1]) == 1
        models = None if single else fit(others, *terms)
        operating, _ = operate(others, Operating(models, (terms[0][0], terms[1][0]), config), f"fold {held}")
        for pair in pairs:
            if fold[pair.concept] == held:
                found = Judged(pair.generated, pair.truth, operating.label(pair), *operating.scores(pair))
                judged.append((pair, found))
    labelled = [found for pair, found in judged if pair.labelled]
    if not labelled:
        raise MemscanError("no labelled pairs to report on")
    strata = sorted({pair.stratum for pair, _ in judged if pair.labelled})
    return {
        **figures(labelled),
        "by_generation": figures([found for _, found in judged])["by_generation"],
        "strata": {name: _of_stratum(judged, name) for name in strata},
    }


def _of_stratum(judged: Sequence[tuple[Scored, Judged]], name: str) -> dict[str, Any]:
    found = figures([one for pair, one in judged if pair.labelled and pair.stratum == name])
    return {key: value for key, value in found.items() if key not in ("auc", "by_generation")}
