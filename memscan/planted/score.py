"""This module compares a census of a planted world with its ground truth, and chooses thresholds for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import dataset

from memscan.config import CensusConfig
from memscan.errors import RunError
from memscan.io import storage
from memscan.metric.calibration import Calibration, calibrate
from memscan.planted.world import read_truth, world_source
from memscan.records import Label, Status, alike


@dataclass(frozen=True)
class Found:
    """This is what a census found for one prompt.

    It has the label (NM if the prompt is not flagged) and the training images that the prompt reaches.

    The label is None of a prompt that was not scanned.
    """

    label: Label | None
    match_ids: tuple[str, ...]


def score_prompts(truth: Sequence[Mapping[str, Any]], found: Mapping[str, Found]) -> dict[str, Any]:
    """Compare verdicts with the ground truth.

    Args:
        truth: rows of `records.TRUTH`.
        found: verdict by prompt_id of every prompt that was scanned. A prompt of the truth that is not in it (rejected,
            passed by a screen, not in the list) counts as `missing` and is never right, whatever the truth says: it is
            wrong in accuracy and recall, and neither flagged nor unflagged in the false-positive rate.

    Returns:
        prompts, scored, missing (counts); accuracy; macro_f1 over the four labels; false_positive_rate: share of the
        scanned ordinary prompts that are flagged; per_class: precision, recall, f1, support; match_precision: share of
        the distinct training images named for all flagged prompts that belong to the prompt's planted group;
        match_recall: share of the planted prompts for which at least one image of the group is named. Rates without a
        denominator are null.
    """
    nothing = Found(None, ())
    same = alike(found, (row["prompt_id"] for row in truth))
    found = {same(prompt): verdict for prompt, verdict in found.items()}
    pairs = [(row, found.get(same(row["prompt_id"]), nothing)) for row in truth]
    missing = sum(same(row["prompt_id"]) not in found for row in truth)
    expected = [Label(row["label"]) for row, _ in pairs]
    labels = [verdict.label for _, verdict in pairs]
    per_class = {label.value: _class_score(expected, labels, label) for label in Label}
    ordinary = [verdict for (row, verdict) in pairs if row["label"] == Label.NM.value and verdict.label is not None]
    planted = [(row, verdict) for row, verdict in pairs if row["label"] != Label.NM.value]
    named = [(match in row["reference_ids"]) for row, verdict in pairs for match in verdict.match_ids]
    reached = [any(match in row["reference_ids"] for match in verdict.match_ids) for row, verdict in planted]
    return {
        "prompts": len(pairs),
        "scored": len(pairs) - missing,
        "missing": missing,
        "accuracy": _mean([a == b for a, b in zip(expected, labels, strict=True)]),
        "macro_f1": sum(entry["f1"] for entry in per_class.values()) / len(per_class),
        "false_positive_rate": _mean([verdict.label is not Label.NM for verdict in ordinary]),
        "per_class": per_class,
        "match_precision": _mean(named),
        "match_recall": _mean(reached),
    }


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _class_score(expected: Sequence[Label], labels: Sequence[Label | None], label: Label) -> dict[str, float | int]:
    hits = sum(a is label and b is label for a, b in zip(expected, labels, strict=True))
    support, predicted = sum(a is label for a in expected), sum(b is label for b in labels)
    return {
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / support if support else 0.0,
        "f1": 2 * hits / (support + predicted) if support + predicted else 0.0,
        "support": support,
    }


def score_run(run: str, world: str | Path | None = None) -> dict[str, Any]:
    """Score a reduced run's verdicts against a world's truth; see `score_prompts`.

    Raises:
        RunError: the run has not been reduced.
        ModelError: there is no world at `world`.
    """
    flagged = storage.join(run, "flagged", "flagged.parquet")
    if not storage.exists(flagged):
        raise RunError("has no flagged list yet", where=run, hint=f"run: memscan reduce {run}")
    truth = read_truth(world).to_pylist()
    rows = _read(storage.join(run, "census"), ["prompt_id", "decision"], pc.field("status") == Status.DONE.value)
    # What a screen passed was not scanned; runs of older versions have no such column.
    passed = rows["decision"].to_pylist() if "decision" in rows.column_names else [None] * rows.num_rows
    ids = [one for one, decision in zip(rows["prompt_id"].to_pylist(), passed, strict=True) if decision != "pass"]
    found = dict.fromkeys(ids, Found(Label.NM, ()))
    for row in _read(flagged, ["prompt_id", "label", "match_ids"]).to_pylist():
        found[row["prompt_id"]] = Found(Label(row["label"]), tuple(row["match_ids"]))
    return score_prompts(truth, found)


def calibrate_run(run: str, world: str | Path | None = None, *, max_false_positive_rate: float = 0.005) -> Calibration:
    """Choose thresholds on a scanned world, from all candidates of all generations and the truth of their prompts.

    The result must not be used to report on the same world.

    Raises:
        RunError: the run is not a finished scan of that world.
    """
    manifest = storage.read_json(storage.join(run, "run.json"))
    planted = read_truth(world).to_pylist()
    rows = _read(storage.join(run, "census"), ["prompt_id", "generations"], pc.field("status") == Status.DONE.value)
    scanned = rows["prompt_id"].to_pylist()
    same = alike(scanned, (row["prompt_id"] for row in planted))
    truth = {same(row["prompt_id"]): row["label"] for row in planted}
    if not set(truth) & set(map(same, scanned)):
        raise RunError("holds none of the world's prompts", where=run, hint="give the world that was scanned: --world")
    foreground, background, labels = [], [], []
    for row in rows.to_pylist():
        for generation in row["generations"] if same(row["prompt_id"]) in truth else ():
            foreground.append([candidate["foreground"] for candidate in generation["candidates"]])
            background.append([candidate["background"] for candidate in generation["candidates"]])
            labels.append(Label(truth[same(row["prompt_id"])]))
    config = CensusConfig.model_validate(manifest["config"])
    return calibrate(
        _padded(foreground),
        _padded(background),
        labels,
        config=config.metric,
        source=world_source(world),
        models={key.removeprefix("models."): name for key, name in manifest["identity"].items() if "models." in key},
        max_false_positive_rate=max_false_positive_rate,
    )


def _read(path: str, columns: list[str], keep: pc.Expression | None = None) -> pa.Table:
    filesystem, inner = storage.arrow_filesystem(path)
    files = dataset.dataset(inner, filesystem=filesystem, format="parquet", exclude_invalid_files=True)
    return files.to_table(columns=[name for name in columns if name in files.schema.names], filter=keep)


def _padded(rows: list[list[float]]) -> NDArray[np.float64]:
    """(N, K) with NaN if a row is shorter."""
    width = max(map(len, rows), default=0)
    return np.clip([row + [np.nan] * (width - len(row)) for row in rows], 0.0, 1.0)
