"""This module measures the metric's variants on pairs whose truth is known.

Thresholds come from one set of pairs, and figures from another.

Both sets hold rendered scenes and photographs: pairs of every label, the same pairs under graded corruptions, traps
(unrelated content under one silhouette) at foreground areas from 2 % to 90 %, and recoloured objects. The sets share
neither seeds nor photographs. Thresholds come from the calibration set, under a bound on false positives. If a variant
cannot keep the bound, the bound is doubled up to 5 % and then given up (as for `paper`, because of its constant fill).
The result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score

from memscan.config import MetricConfig
from memscan.errors import MemscanError
from memscan.evaluation.corruptions import CORRUPTIONS
from memscan.evaluation.pairs import Pair, draw_pairs, draw_recoloured, draw_traps
from memscan.evaluation.photographs import draw_photograph_pairs, draw_photograph_traps, installed
from memscan.metric.calibration import Calibration, calibrate
from memscan.metric.fbmem import FbMem, RegionScores
from memscan.metric.variants import load_metric
from memscan.records import Label

# Foreground areas of the traps. From 2 to 3 % a region is degenerate by rule: it is shown, nothing is asked of it.
AREA_BINS = ((0.02, 0.03), (0.03, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.5), (0.5, 0.7), (0.7, 0.9))
TRAPS = 3
# Bounds on false positives are doubled up to this one, then given up.
LOOSEST_BOUND = 0.05
MASKS = "exact masks"  # in the place of a segmenter's specification


@dataclass(frozen=True)
class Trial:
    """A trial holds pairs that are reported together.

    Attributes:
        kind: "clean", "corruption", "area" or "recoloured".
        name: e.g. "jpeg 30" or "3-5 %".
    """

    kind: str
    name: str
    pairs: Sequence[Pair]


def draw_trials(seed: int, count: int, half: int, *, size: int = 64) -> Iterator[Trial]:
    """Yield the evaluation set of one seed, which is drawn while it is used.

    Args:
        seed: of scenes, crops and corruptions.
        count: clean pairs of each label and family; a corruption takes a third of them, and there are three times as
            many traps of each area and family.
        half: which photographs (`photographs.HALVES`).
        size: side of the pictures, in pixels.
    """
    photographs = bool(installed(half))
    clean = list(draw_pairs(seed, count, size=size))
    if photographs:
        clean += draw_photograph_pairs(seed, count, half, size=size)
    yield Trial("clean", "none", clean)
    third = [pair for number, pair in enumerate(clean) if (number // len(Label)) % 3 == 0]
    for corruption in CORRUPTIONS:
        spoilt = [corruption.apply(pair, seed + number) for number, pair in enumerate(third)]
        yield Trial("corruption", corruption.name, spoilt)
    for low, high in AREA_BINS:
        traps = list(draw_traps(seed, TRAPS * count, areas=(low, high), size=size))
        if photographs:
            traps += draw_photograph_traps(seed, TRAPS * count, half, areas=(low, high), size=size)
        yield Trial("area", f"{low * 100:g}-{high * 100:g} %", traps)
    yield Trial("recoloured", "foreground", list(draw_recoloured(seed, count, size=size)))


@dataclass(frozen=True)
class Scored:
    """This holds a trial's pairs under one variant.

    They have labels and scores, foreground and background (N, 2) in [0, 1].
    """

    trial: Trial
    truth: tuple[Label, ...]
    scores_N2: NDArray[np.float64]


def score_pairs(metric: FbMem[Any], pairs: Sequence[Pair]) -> list[RegionScores]:
    """Return scores of every pair."""
    found = []
    for pair in pairs:
        generated = metric.prepare(pair.generated.image_HWC, pair.generated.mask_HW)
        reference = metric.prepare(pair.reference.image_HWC, pair.reference.mask_HW)
        found.extend(metric.score(generated, [reference]))
    return found


def calibrate_variant(config: MetricConfig, scored: Sequence[Scored], source: str, bound: float) -> Calibration:
    """Return thresholds of one variant from its calibration set.

    Traps of degenerate size, and unrelated pairs under a corruption, are left out, because 26 corrupted versions of one
    pair are not 26 independent trials, and a bound on a rate needs independent trials.

    Raises:
        MemscanError: no thresholds keep the bound; with a bound of 1 there always are some.
    """
    asked = [entry for entry in scored if entry.trial.name != _bin_name(AREA_BINS[0])]
    used = [
        _where(entry, [entry.trial.kind != "corruption" or label is not Label.NM for label in entry.truth])
        for entry in asked
    ]
    scores_N2 = np.concatenate([entry.scores_N2 for entry in used])
    return calibrate(
        scores_N2[:, 0],
        scores_N2[:, 1],
        [label for entry in used for label in entry.truth],
        config=config,
        source=source,
        models={"segmenter": MASKS},
        max_false_positive_rate=bound,
        confidence=0.95 if bound < 1 else 0.0,
    )


def evaluate_metric(
    configs: Mapping[str, MetricConfig],
    *,
    seed: int = 1,
    calibration_seed: int = 1001,
    count: int = 100,
    size: int = 64,
    bound: float = 0.01,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, Calibration]]:
    """Calibrate every variant on one set and report it on another.

    Args:
        configs: by the name a row of the tables gets.
        seed, calibration_seed: must differ.
        count, size: see `draw_trials`.
        bound: on the false-positive rate, at 95 % confidence.

    Returns:
        A document for JSON (settings, per variant: calibration, bounded, clean, photographs, corruptions, areas,
        recoloured), and the calibrations by name.

    Raises:
        MemscanError: one seed for both sets.
    """
    if seed == calibration_seed:
        raise MemscanError("calibration and evaluation need different seeds", where=f"seed {seed}")
    metrics = {name: load_metric(config) for name, config in configs.items()}
    first = _score(metrics, draw_trials(calibration_seed, count, 0, size=size), "calibration", progress)
    source = f"evaluation pairs of seed {calibration_seed}, {count} of a kind, {size} px"
    calibrations, bounded = {}, {}
    for name, config in configs.items():
        calibrations[name] = _strictest(config, first[name], source, bound)
        bounded[name] = calibrations[name].max_false_positive_rate < 1
    second = _score(metrics, draw_trials(seed, count, 1, size=size), "evaluation", progress)
    variants = {
        name: {
            "calibration": _facts(calibrations[name]),
            "bounded": bounded[name],
            **_figures(load_metric(calibrations[name].apply(configs[name])), second[name]),
        }
        for name in configs
    }
    settings = {"seed": seed, "calibration_seed": calibration_seed, "count": count, "size": size, "bound": bound}
    photographs = {"calibration": list(installed(0)), "evaluation": list(installed(1))}
    return {"settings": {**settings, "photographs": photographs}, "variants": variants}, calibrations


def _strictest(config: MetricConfig, scored: Sequence[Scored], source: str, bound: float) -> Calibration:
    """Return thresholds under the bound; where none keep it, under twice the bound, and so on; at last under none."""
    while bound <= LOOSEST_BOUND:
        try:
            return calibrate_variant(config, scored, source, bound)
        except MemscanError:
            bound *= 2
    return calibrate_variant(config, scored, source, 1.0)


def _score(
    metrics: Mapping[str, FbMem[Any]], trials: Iterator[Trial], title: str, progress: Callable[[str], None]
) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = {name: [] for name in metrics}
    for trial in trials:
        progress(f"{title}: {trial.kind} {trial.name}")
        for name, metric in metrics.items():
            scores = [(row.foreground, row.background) for row in score_pairs(metric, trial.pairs)]
            truth = tuple(pair.label for pair in trial.pairs)
            found[name].append(Scored(trial, truth, np.clip(np.asarray(scores, np.float64), 0, 1)))
    return found


def _figures(metric: FbMem[Any], scored: Sequence[Scored]) -> dict[str, Any]:
    """Return what is reported of one variant."""
    clean = next(entry for entry in scored if entry.trial.kind == "clean")
    families = [pair.family for pair in clean.trial.pairs]
    return {
        "clean": _table_row(metric, clean),
        "families": {
            family: _table_row(metric, _where(clean, [own == family for own in families]))
            for family in sorted(set(families))
        },
        "corruptions": {e.trial.name: _table_row(metric, e) for e in scored if e.trial.kind == "corruption"},
        "areas": {e.trial.name: _false_positives(metric, e) for e in scored if e.trial.kind == "area"},
        "recoloured": next(_share_right(metric, e) for e in scored if e.trial.kind == "recoloured"),
    }


def _table_row(metric: FbMem[Any], scored: Scored) -> dict[str, float]:
    predicted = _labels(metric, scored)
    truth = [label.value for label in scored.truth]
    copied = {
        "foreground": [label in (Label.VM, Label.FM) for label in scored.truth],
        "background": [label in (Label.VM, Label.BM) for label in scored.truth],
    }
    return {
        "pairs": len(truth),
        "macro_f1": float(f1_score(truth, predicted, average="macro", labels=[label.value for label in Label])),
        **_false_positives(metric, scored),
        **{
            f"auc_{region}": float(roc_auc_score(copied[region], scored.scores_N2[:, column]))
            for column, region in enumerate(copied)
        },
    }


def _false_positives(metric: FbMem[Any], scored: Scored) -> dict[str, float]:
    found = [
        label != Label.NM.value
        for label, truth in zip(_labels(metric, scored), scored.truth, strict=True)
        if truth is Label.NM
    ]
    return {"unrelated": len(found), "false_positives": sum(found), "false_positive_rate": float(np.mean(found))}


def _share_right(metric: FbMem[Any], scored: Scored) -> dict[str, float]:
    right = [label == truth.value for label, truth in zip(_labels(metric, scored), scored.truth, strict=True)]
    return {"pairs": len(right), "right": float(np.mean(right))}


def _labels(metric: FbMem[Any], scored: Scored) -> list[str]:
    return [metric.classify(RegionScores(f, b, 0.0)).value for f, b in scored.scores_N2.tolist()]


def _where(scored: Scored, keep: Sequence[bool]) -> Scored:
    truth = tuple(label for label, kept in zip(scored.truth, keep, strict=True) if kept)
    return Scored(scored.trial, truth, scored.scores_N2[np.asarray(keep)])


def _facts(calibration: Calibration) -> dict[str, Any]:
    return {
        "foreground_threshold": calibration.foreground_threshold,
        "background_threshold": calibration.background_threshold,
        "max_false_positive_rate": calibration.max_false_positive_rate,
        "confidence": calibration.confidence,
        "false_positive_rate": calibration.false_positive_rate,
        "false_positive_bound": calibration.false_positive_bound,
        "unrelated": calibration.counts[Label.NM.value],
        "canvas": calibration.canvas,
        "source": calibration.source,
    }


def _bin_name(area: tuple[float, float]) -> str:
    return f"{area[0] * 100:g}-{area[1] * 100:g} %"
