"""What a screen misses, with some hundred positives: recall against the full scan, with its lower 95 % bound.

Two sets of captions of the shipped planted world are scanned in full; those that this flags are the positives.

* **seeds**: the planted prompts under several base seeds, each with its own bank and generations. A bound over seeds,
  for these prompts: the trials of one prompt are not independent.
* **retold**: other captions around the planted names, half of them in wordings that were never trained on. Many are
  memorised in part only.

A screened scan's generations are the full scan's, from the same seeds. So what it flags is read off: the flagged
captions whose score reaches the threshold and of whose first samples one is memorised (tests hold the scan to that).
Thresholds come from another world: from its planted prompts, as in `benchmarks.screen`; and from its retold captions,
by the rule of `memscan evaluate screen`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.screen import build_index, run, threshold_from
from memscan.config import CensusConfig, ScreenConfig
from memscan.detection.decide import choose_threshold
from memscan.intervals import lower_limit
from memscan.models.generator import Generator
from memscan.planted.captions import retold_titles
from memscan.planted.world import check_apart, read_truth, world_config
from memscan.records import Label, prompt_id
from memscan.worker.screen import Screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate-on", required=True, metavar="DIR", help="another planted world")
    parser.add_argument("--bases", type=int, default=7, help="base seeds")
    parser.add_argument("--retold", type=int, default=24, help="captions of a planted group")
    parser.add_argument("--steps", type=int, default=10, help="of the scans that say what is memorised")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--first-samples", type=int, default=2)
    parser.add_argument("--timestep", type=float, default=500.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    other = arguments.calibrate_on
    check_apart(None, other)
    started = time.perf_counter()
    threshold = threshold_from(other, arguments.timestep)
    titles, retold = [title for group in _groups(None) for title in group], _retold(None, arguments.retold)
    with tempfile.TemporaryDirectory() as folder:
        build_index(world_config(), folder)
        seeds = [_scanned(None, arguments, folder, titles, base) for base in range(1, arguments.bases + 1)]
        again = _scanned(None, arguments, folder, retold, 0)
    with tempfile.TemporaryDirectory() as folder:
        build_index(world_config(other), folder)
        there = _scanned(other, arguments, folder, _retold(other, arguments.retold), 0)
    chosen = choose_threshold(there.scores, _ordinary(other, arguments.timestep).tolist())
    ordinary = _ordinary(None, arguments.timestep)
    rows = {
        "seeds": _figures(seeds, threshold, ordinary),
        "retold": _figures([again], threshold, ordinary),
        "retold, own threshold": _figures([again], chosen.threshold, ordinary),
    }
    print(f"{'':24}{'threshold':>10}{'caught':>8}{'of':>6}{'recall':>9}{'at least':>10}{'ordinary above':>16}")
    for name, row in rows.items():
        figures = f"{row['caught']:8}{row['flagged']:6}{row['recall']:9.4f}{row['low']:10.4f}"
        print(f"{name:24}{row['threshold']:10.3f}{figures}{row['ordinary_above']:16.3f}")
    settings = {**vars(arguments), "calibrate_on": "planted world 2"}
    facts = {"benchmark": "recall", "settings": settings, "seconds": time.perf_counter() - started}
    print(json.dumps({**facts, "asked": {"seeds": len(titles) * len(seeds), "retold": len(retold)}, "rows": rows}))


@dataclass(frozen=True)
class Scanned:
    """Scores of the captions that a full scan flags, and whether one of their first samples is memorised."""

    scores: list[float]
    early: list[bool]

    def caught(self, threshold: float) -> int:
        return sum(score >= threshold and early for score, early in zip(self.scores, self.early, strict=True))


def _scanned(world: str | None, arguments: argparse.Namespace, folder: str, captions: list[str], base: int) -> Scanned:
    data = world_config(world).model_dump()
    settings = {"steps": arguments.steps, "samples": arguments.samples, "batch_size": 24, "base_seed": base}
    data["generator"] |= settings
    config = CensusConfig.model_validate(data)
    found = run(config, folder, captions)
    scores = dict(zip(captions, _scores(config, captions, arguments.timestep), strict=True))
    rows = {row["prompt_id"]: row["generations"] for row in found["census"].to_pylist()}
    flagged = [caption for caption in captions if prompt_id(caption) in found["flagged"]]

    def early(caption: str) -> bool:
        first = [one for one in rows[prompt_id(caption)] if one["sample"] < arguments.first_samples]
        return any(one["label"] != Label.NM.value for one in first)

    return Scanned([scores[caption] for caption in flagged], [early(caption) for caption in flagged])


def _scores(config: CensusConfig, captions: list[str], timestep: float) -> list[float]:
    return Screen(ScreenConfig(threshold=0.0, timestep=timestep), Generator.load(config.generator)).scores(captions)


def _ordinary(world: str | None, timestep: float) -> np.ndarray:
    captions = [row["caption"] for row in read_truth(world).to_pylist() if row["label"] == Label.NM.value]
    return np.array(_scores(world_config(world), captions, timestep))


def _groups(world: str | None) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for row in read_truth(world).to_pylist():
        if row["group"]:
            groups.setdefault(row["group"], []).append(row["caption"])
    return list(groups.values())


def _retold(world: str | None, count: int) -> list[str]:
    rng = np.random.default_rng(2026)
    return [caption for titles in _groups(world) for caption in retold_titles(titles, count, rng)]


def _figures(sets: list[Scanned], threshold: float, ordinary_N: np.ndarray) -> dict[str, Any]:
    flagged, kept = sum(len(one.scores) for one in sets), sum(one.caught(threshold) for one in sets)
    return {
        "threshold": threshold,
        "flagged": flagged,
        "caught": kept,
        "recall": kept / max(1, flagged),
        "low": lower_limit(kept, flagged),
        "ordinary_above": float((ordinary_N >= threshold).mean()),
    }


if __name__ == "__main__":
    main()
