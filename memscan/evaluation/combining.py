"""This module fits weights and thresholds on scored real pairs, and cross-validates them by concept.

A census uses the most severe of a generation's candidates, so operating points are chosen by generation: they
maximise macro-F1 among those under which no unmemorised generation of the fitting rows has a label. Concepts (what is
in the picture) never lie in two folds. Ambiguous pairs take no part.

Cross-validation is nested: the strength of the models' regularisation is chosen inside the fitting concepts, by an
inner cross-validation by concept. Its measure is the area under the ROC curve, since operating points are chosen
afterwards and the scale of a score does not matter. The strongest regularisation within one standard error of the best
is taken (Breiman et al. 1984), because few pairs are FM or BM. So nothing is chosen on the data on which it is
reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from memscan.config import MetricConfig
from memscan.errors import MemscanError
from memscan.metric.calibration import Calibration, calibrate
from memscan.metric.combination import Models, RegionModel
from memscan.metric.decision import SEVERITY, label_of
from memscan.metric.labelled import Judged, figures
from memscan.records import Label

FOLDS = 5
# Strengths of the logistic models' regularisation to choose from: scikit-learn's C, the inverse.
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
AREAS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # bins of the reference's foreground
MOST = 0.05  # upper limit of the false positives' interval that an operating point may have: none of some 90 has .034

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """This is one pair with what was measured of it.

    Attributes:
        concept: of the reference; the fold's unit.
        stratum: for tables.
        labelled: False for a candidate that only a search found; it is NM, and counts by generation only.
        terms: by name.
        missing: regions that the pair does not have.
        area: the reference's foreground, as a share of the image.
    """

    generated: str
    concept: str
    truth: Label
    stratum: str
    labelled: bool
    terms: Mapping[str, float]
    missing: tuple[str, ...]
    area: float = 0.0


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


@dataclass(frozen=True)
class Fitted:
    """These are the models of both regions.

    Attributes:
        strengths: of the foreground's and the background's regularisation, from `STRENGTHS`.
    """

    models: Models
    strengths: tuple[float, float]


def fit(pairs: Sequence[Scored], foreground: Sequence[str], background: Sequence[str], seed: int = 0) -> Fitted:
    """Return a logistic model per region, fitted on the pairs that have it; copies and others weigh the same.

    Args:
        foreground, background: names of the terms.
        seed: of the inner folds.
    """
    fold_N = folded(pairs, seed + 1)
    own, first = _fitted(pairs, fold_N, foreground, "foreground", (Label.VM, Label.FM))
    other, second = _fitted(pairs, fold_N, background, "background", (Label.VM, Label.BM))
    return Fitted(Models(own, other), (first, second))


def folded(pairs: Sequence[Scored], seed: int) -> npt.NDArray[np.int64]:
    """Return the fold of every pair, (N,): concepts are dealt to `FOLDS` in an order that the seed decides."""
    concepts = sorted({pair.concept for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(concepts))
    fold = {concepts[concept]: place % FOLDS for place, concept in enumerate(order.tolist())}
    return np.array([fold[pair.concept] for pair in pairs], dtype=np.int64)


def _fitted(
    pairs: Sequence[Scored],
    fold_N: npt.NDArray[np.int64],
    names: Sequence[str],
    region: str,
    copied: Sequence[Label],
) -> tuple[RegionModel, float]:
    terms_NT = np.array([[pair.terms[name] for name in names] for pair in pairs])
    has_N = np.array([region not in pair.missing for pair in pairs])
    truth_N = np.array([pair.truth in copied for pair in pairs])
    areas = {strength: _areas(terms_NT[has_N], truth_N[has_N], fold_N[has_N], strength) for strength in STRENGTHS}
    best = max(areas.values(), key=np.mean)
    enough = best.mean() - best.std(ddof=1) / len(best) ** 0.5
    chosen = min(strength for strength, found in areas.items() if found.mean() >= enough)
    model = _logistic(terms_NT[has_N], truth_N[has_N], chosen)
    weights = dict(zip(names, model.coef_[0].tolist(), strict=True))
    return RegionModel(float(model.intercept_[0]), weights), chosen


def _areas(terms_NT: Floats, truth_N: npt.NDArray[np.bool_], fold_N: npt.NDArray[np.int64], strength: float) -> Floats:
    """Area under the ROC curve in every fold that holds both kinds, by a model of the other folds."""
    found = []
    for fold in np.unique(fold_N):
        held = fold_N == fold
        if len(set(truth_N[held])) == 2:
            model = _logistic(terms_NT[~held], truth_N[~held], strength)
            found.append(roc_auc_score(truth_N[held], model.decision_function(terms_NT[held])))
    return np.array(found)


def _logistic(terms_NT: Floats, truth_N: npt.NDArray[np.bool_], strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(terms_NT, truth_N)


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
    """Return figures of pairs that were judged by what other concepts chose: by pair, generation, stratum and area.

    Args:
        terms: of the foreground and background; one each takes the term as the score, several are fitted.
        seed: of the order in which concepts are dealt to folds.
    """
    fold_N = folded(pairs, seed)
    judged: list[tuple[Scored, Judged]] = []
    strengths = []
    for held in range(FOLDS):
        others = [pair for pair, fold in zip(pairs, fold_N, strict=True) if fold != held]
        single = len(terms[0]) == len(terms[1]) == 1
        fitted = None if single else fit(others, *terms, seed=seed)
        chosen = Operating(None if fitted is None else fitted.models, (terms[0][0], terms[1][0]), config)
        operating, _ = operate(others, chosen, f"fold {held}")
        strengths.append(None if fitted is None else fitted.strengths)
        for pair, fold in zip(pairs, fold_N, strict=True):
            if fold == held:
                found = Judged(pair.generated, pair.truth, operating.label(pair), *operating.scores(pair))
                judged.append((pair, found))
    labelled = [found for pair, found in judged if pair.labelled]
    if not labelled:
        raise MemscanError("no labelled pairs to report on")
    strata = sorted({pair.stratum for pair, _ in judged if pair.labelled})
    by_stratum = {
        name: _part([one for pair, one in judged if pair.labelled and pair.stratum == name]) for name in strata
    }
    by_area = {
        f"{low:.0%}-{high:.0%}": _part([one for pair, one in judged if pair.labelled and low <= pair.area < high])
        for low, high in itertools.pairwise(AREAS)
    }
    return {
        **figures(labelled),
        "by_generation": figures([found for _, found in judged])["by_generation"],
        "strata": by_stratum,
        "areas": {name: one for name, one in by_area.items() if one is not None},
        "strengths": strengths,
    }


def _part(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """Figures by pair of a part; None if there are no pairs."""
    if not judged:
        return None
    return {key: value for key, value in figures(judged).items() if key not in ("auc", "by_generation")}
