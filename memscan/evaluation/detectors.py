"""This module measures detectors on a planted world, where it is known which prompts are memorised.

It measures the detectors of the first step, which decide before anything is generated, and those that a scan computes
without further cost. The latter give a score per generation, and the mean over a prompt's generations is the score of
the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from memscan.detection.base import DetectorSpec, Need
from memscan.detection.decide import choose_threshold
from memscan.detection.first_step import FirstStepper, bank_seeds
from memscan.detection.one_step import DETECTORS
from memscan.detection.released import PADDED_ENTROPY, RELEASED, PaddedEntropyHook
from memscan.detection.sampled import AttentionHook, tiled_similarity
from memscan.detection.specifications import COPY, SAMPLED, TILED_L2
from memscan.io.images import decode
from memscan.models.attention import has_cross_attention
from memscan.models.embedder import load_embedder
from memscan.models.generator import Generator
from memscan.planted.world import check_apart, read_truth, world_config, world_folder, world_source
from memscan.records import Label, sample_seed

Scores = NDArray[np.float64]


def evaluate_detectors(
    world: str | Path | None = None,
    calibration: str | Path | None = None,
    *,
    seeds: int = 4,
    sampled: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return every detector on all prompts of a world.

    Args:
        world: reported on; the shipped one by default.
        calibration: another world, on which each detector's threshold is chosen; without one none is.
        seeds: of the bank, and generations of a prompt; scores are means over them.
        sampled: whether to generate, for the detectors that need it.

    Returns:
        JSON values: for each of `detectors` (of the first step) and `signals` (of a scan) `auc`, `tpr_at_1_fpr`,
        `calls` a prompt, `added` (those beyond a scan's own), `nan`, `missing` (why it does not apply) and, with a
        calibration world, `recall` and `false_positives` at the threshold that is fixed there.

    Raises:
        ModelError, ConfigError: as `planted.world.check_apart` does.
    """
    check_apart(world, calibration)
    kinds = {"detectors": _scores, **({"signals": _sampled} if sampled else {})}
    worlds = [world] if calibration is None else [world, calibration]
    both = {kind: [score(one, seeds, progress) for one in worlds] for kind, score in kinds.items()}
    found = both["detectors"][0]
    return {
        "world": world_source(world),
        "calibration": None if calibration is None else world_source(calibration),
        "seeds": seeds,
        "memorised": int(found.memorised.sum()),
        "ordinary": int((~found.memorised).sum()),
        **{kind: _rows(*results) for kind, results in both.items()},
    }


class _Found:
    """Scores by detector, which prompts are memorised, why detectors do not apply, and what each costs a prompt."""

    def __init__(self, memorised: NDArray[np.bool_]) -> None:
        self.memorised = memorised
        self.specs: dict[str, DetectorSpec] = {}
        self.calls: dict[str, tuple[int, int]] = {}  # in all, and beyond a scan's own
        self.scores: dict[str, Scores] = {}
        self.missing: dict[str, list[str]] = {}


def _rows(found: _Found, fixed: _Found | None = None) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, spec in found.specs.items():
        calls, added = found.calls[name]
        row = {"source": spec.source, "calls": calls, "added": added, "missing": found.missing[name]}
        if name in found.scores:
            row |= _figures(found.scores[name], found.memorised)
            if fixed is not None and name in fixed.scores:
                row |= _at_fixed(fixed, found, name)
        rows[name] = row
    return rows


def _scores(world: str | Path | None, seeds: int, progress: Callable[[str], None]) -> _Found:
    truth = read_truth(world).to_pylist()
    found = _Found(np.array([row["label"] != Label.NM.value for row in truth]))
    stepper = FirstStepper(Generator.load(world_config(world).generator), bank_seeds(seeds))
    step = stepper([row["caption"] for row in truth])
    for detector in (*DETECTORS, *RELEASED):
        name = detector.spec.name
        found.specs[name], found.calls[name] = detector.spec, (detector.spec.calls * seeds,) * 2
        found.missing[name] = detector.spec.missing(stepper.available)
        if not found.missing[name]:
            with torch.no_grad():
                found.scores[name] = detector.score(step).double().numpy()
            progress(f"{world_source(world)}: {name}")
    return found


def _sampled(world: str | Path | None, seeds: int, progress: Callable[[str], None]) -> _Found:
    """Signals of a scan of all prompts, under the world's own sampling rule: means over `seeds` generations."""
    truth = read_truth(world).to_pylist()
    found = _Found(np.array([row["label"] != Label.NM.value for row in truth]))
    config = world_config(world)
    generator, embedder = Generator.load(config.generator), load_embedder(config.embedder)
    unet = generator.checkpoint.unet
    generator.hooks = (*generator.hooks, AttentionHook(unet), PaddedEntropyHook(unet))
    table = pq.read_table(world_folder(world) / "references.parquet", columns=["image"])
    references_ND = embedder.embed([decode(image) for image in table["image"].to_pylist()])
    chunk = max(1, generator.batch_size // seeds)
    taken: dict[str, list[float]] = {}
    for at in range(0, len(truth), chunk):
        rows = [row for row in truth[at : at + chunk] for _ in range(seeds)]
        numbers = [sample_seed(row["prompt_id"], number % seeds) for number, row in enumerate(rows)]
        made = generator.generate([row["caption"] for row in rows], numbers)
        values = {name: one.reshape(-1, seeds) for name, one in made.signals.items()}
        cosines_BN = embedder.embed(list(made.images_BHWC)) @ references_ND.T
        values[COPY.name] = cosines_BN.max(axis=1).reshape(-1, seeds)
        if seeds > 1:
            by_prompt = made.images_BHWC.reshape(-1, seeds, *made.images_BHWC.shape[1:])
            values[TILED_L2.name] = np.stack([np.asarray(tiled_similarity(one)) for one in by_prompt])
        for name, one in values.items():
            taken.setdefault(name, []).extend(one.mean(axis=1).tolist())
    rule = generator.config
    calls = seeds * rule.steps * (2 if rule.guidance > 1 else 1)
    for spec in (*SAMPLED, PADDED_ENTROPY):
        found.specs[spec.name], found.calls[spec.name] = spec, (calls, spec.calls)
        found.missing[spec.name] = spec.missing(_available(generator, seeds))
        if spec.name in taken:
            found.scores[spec.name] = np.array(taken[spec.name], np.float64)
    progress(f"{world_source(world)}: signals of {len(truth) * seeds} generations")
    return found


def _available(generator: Generator, seeds: int) -> set[Need]:
    """Return what the signals of a world's scan can have: no image encoder for meaning comes with one."""
    found = {Need.REFERENCES}
    if generator.config.guidance > 1:
        found.add(Need.GUIDANCE)
    if has_cross_attention(generator.checkpoint.unet):
        found.add(Need.CROSS_ATTENTION)
    if seeds > 1:
        found.add(Need.SEVERAL_GENERATIONS)
    return found


def _figures(scores_N: Scores, memorised_N: NDArray[np.bool_]) -> dict[str, Any]:
    finite_N = np.isfinite(scores_N)
    positive, negative = scores_N[finite_N & memorised_N], scores_N[finite_N & ~memorised_N]
    nan = int((~finite_N).sum())
    if not len(positive) or not len(negative):
        return {"nan": nan, "auc": None, "tpr_at_1_fpr": None}
    return {
        "nan": nan,
        "auc": area_under_curve(positive, negative),
        "tpr_at_1_fpr": float((positive > np.sort(negative)[-1 - int(0.01 * len(negative))]).mean()),
    }


def _at_fixed(fixed: _Found, found: _Found, name: str) -> dict[str, Any]:
    """Recall and false alarms at the threshold that the other world's finite scores choose; NaN alarms nobody."""
    known, scores = fixed.scores[name], found.scores[name]
    memorised, ordinary = (known[np.isfinite(known) & rows].tolist() for rows in (fixed.memorised, ~fixed.memorised))
    if not memorised:
        return {}
    threshold = choose_threshold(memorised, ordinary).threshold
    return {
        "threshold": threshold,
        "recall": float((scores[found.memorised] >= threshold).mean()),
        "false_positives": float((scores[~found.memorised] >= threshold).mean()),
    }


def area_under_curve(positive: Scores, negative: Scores) -> float:
    """Return the share of pairs whose memorised member scores higher, ties half (Mann-Whitney)."""
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    pairs = len(positive) * len(negative)
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / pairs) if pairs else float("nan")


def detector_table(document: Mapping[str, Any]) -> str:
    """Return the evaluation as Markdown."""
    lines = [
        (
            f"{document['world']}: {document['memorised']} memorised, {document['ordinary']} ordinary prompts, "
            f"{document['seeds']} seeds. Thresholds fixed on {document['calibration'] or 'no other world'}."
        ),
        "",
        "| detector | source | calls per prompt | AUC | TPR at 1% FPR | recall, false alarms at a threshold | NaN |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(name, row) for name, row in document["detectors"].items()]
    if "signals" in document:
        lines.append("| *of a scan's own sampling:* | | | | | | |")
        lines += [_line(name, row) for name, row in document["signals"].items()]
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any]) -> str:
    calls = str(row["calls"]) if row["added"] == row["calls"] else f"{row['calls']} ({row['added']} more)"
    if row["missing"]:
        cells = f"does not apply: needs {', '.join(row['missing'])} | | |"
    else:
        fixed = f"{row['recall']:.3f}, {row['false_positives']:.3f}" if "recall" in row else ""
        auc = " | " if row["auc"] is None else f"{row['auc']:.4f} | {row['tpr_at_1_fpr']:.3f}"
        cells = f"{auc} | {fixed} | {row['nan']}"
    return f"| {name} | {row['source']} | {calls} | {cells} |"
