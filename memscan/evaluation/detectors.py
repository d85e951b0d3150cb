"""First-step detectors on a planted world, where it is known which prompts are memorised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from memscan.detection.decide import choose_threshold
from memscan.detection.first_step import FirstStepper, bank_seeds
from memscan.detection.one_step import DETECTORS
from memscan.models.generator import Generator
from memscan.planted.world import read_truth, world_config, world_source
from memscan.records import Label

Scores = NDArray[np.float64]


def evaluate_detectors(
    world: str | Path | None = None,
    calibration: str | Path | None = None,
    *,
    seeds: int = 4,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Every first-step detector on all prompts of a world.

    Args:
        world: reported on; the shipped one by default.
        calibration: another world, on which each detector's threshold is chosen; without one none is.
        seeds: of the bank; the first of the pairs that scores are means over.

    Returns:
        JSON values: for each detector `auc`, `tpr_at_1_fpr`, `calls` a prompt, `nan`, `missing` (why it does not apply)
        and, with a calibration world, `recall` and `false_positives` at the threshold that is fixed there.
    """
    found = _scores(world, seeds, progress)
    fixed = _scores(calibration, seeds, progress) if calibration is not None else None
    rows = {}
    for detector in DETECTORS:
        name, about = detector.about.name, detector.about
        row: dict[str, Any] = {"source": about.source, "calls": about.calls * seeds, "missing": found.missing[name]}
        if name in found.scores:
            row |= _figures(found.scores[name], found.memorised)
            if fixed is not None and name in fixed.scores:
                row |= _at_fixed(fixed, found, name)
        rows[name] = row
    return {
        "world": world_source(world),
        "calibration": None if calibration is None else world_source(calibration),
        "seeds": seeds,
        "memorised": int(found.memorised.sum()),
        "ordinary": int((~found.memorised).sum()),
        "detectors": rows,
    }


class _Found:
    """Scores by detector, which prompts are memorised, and why detectors do not apply."""

    def __init__(self, memorised: NDArray[np.bool_]) -> None:
        self.memorised = memorised
        self.scores: dict[str, Scores] = {}
        self.missing: dict[str, list[str]] = {}


def _scores(world: str | Path | None, seeds: int, progress: Callable[[str], None]) -> _Found:
    truth = read_truth(world).to_pylist()
    found = _Found(np.array([row["label"] != Label.NM.value for row in truth]))
    stepper = FirstStepper(Generator.load(world_config(world).generator), bank_seeds(seeds))
    step = stepper([row["caption"] for row in truth])
    for detector in DETECTORS:
        name = detector.about.name
        found.missing[name] = detector.about.missing(stepper.available)
        if not found.missing[name]:
            with torch.no_grad():
                found.scores[name] = detector.score(step).double().numpy()
            progress(f"{world_source(world)}: {name}")
    return found


def _figures(scores_N: Scores, memorised_N: NDArray[np.bool_]) -> dict[str, Any]:
    finite_N = np.isfinite(scores_N)
    positive, negative = scores_N[finite_N & memorised_N], scores_N[finite_N & ~memorised_N]
    return {
        "nan": int((~finite_N).sum()),
        "auc": area_under_curve(positive, negative),
        "tpr_at_1_fpr": float((positive > np.sort(negative)[-1 - int(0.01 * len(negative))]).mean()),
    }


def _at_fixed(fixed: _Found, found: _Found, name: str) -> dict[str, Any]:
    known, scores = fixed.scores[name], found.scores[name]
    threshold = choose_threshold(known[fixed.memorised].tolist(), known[~fixed.memorised].tolist()).threshold
    return {
        "threshold": threshold,
        "recall": float((scores[found.memorised] >= threshold).mean()),
        "false_positives": float((scores[~found.memorised] >= threshold).mean()),
    }


def area_under_curve(positive: Scores, negative: Scores) -> float:
    """Share of pairs whose memorised member scores higher, ties half (Mann-Whitney)."""
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    pairs = len(positive) * len(negative)
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / pairs) if pairs else float("nan")


def detector_table(document: Mapping[str, Any]) -> str:
    """The evaluation as Markdown."""
    lines = [
        (
            f"{document['world']}: {document['memorised']} memorised, {document['ordinary']} ordinary prompts, "
            f"{document['seeds']} seeds. Thresholds fixed on {document['calibration'] or 'no other world'}."
        ),
        "",
        "| detector | source | calls a prompt | AUC | TPR at 1% FPR | recall, false alarms at fixed threshold | NaN |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in document["detectors"].items():
        if row["missing"]:
            cells = f"does not apply: needs {', '.join(row['missing'])} | | |"
        else:
            fixed = f"{row['recall']:.3f}, {row['false_positives']:.3f}" if "recall" in row else ""
            cells = f"{row['auc']:.4f} | {row['tpr_at_1_fpr']:.3f} | {fixed} | {row['nan']}"
        lines.append(f"| {name} | {row['source']} | {row['calls']} | {cells} |")
    return "\n".join(lines)
