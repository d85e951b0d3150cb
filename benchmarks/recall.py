"""What a screen misses, with some hundred positives: recall against the full scan, with its lower 95 % bound.

Two sets of positives of one planted world, each scanned in full and, as far as that flags them, by the screened scan
(`benchmarks.screen` has the protocol and the calls; thresholds come from another world):

* **seeds**: the planted prompts under several base seeds, each with its own bank and generations. A bound over seeds,
  for these prompts: the trials of one prompt are not independent.
* **retold**: other captions around the planted names, half of them in wordings that were never trained on. Many are
  memorised in part only. A second threshold for these is chosen on the other world's, as `memscan evaluate screen`
  would choose one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import beta

from benchmarks.screen import build_index, run, threshold_from
from memscan.config import CensusConfig, ScreenConfig
from memscan.detection.decide import ScreenThreshold, choose_threshold
from memscan.models.generator import Generator
from memscan.planted.captions import retold_titles
from memscan.planted.world import check_apart, read_truth, world_config
from memscan.records import prompt_id
from pipelines.screen import Screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate-on", required=True, metavar="DIR", help="another planted world")
    parser.add_argument("--bases", type=int, default=7, help="base seeds")
    parser.add_argument("--retold", type=int, default=24, help="captions of a planted group")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--first-samples", type=int, default=2)
    parser.add_argument("--timestep", type=float, default=500.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    check_apart(None, arguments.calibrate_on)
    started = time.perf_counter()
    own = threshold_from(arguments.calibrate_on, arguments.timestep)
    titles = [row["caption"] for row in read_truth().to_pylist() if row["label"] != "NM"]
    with tempfile.TemporaryDirectory() as folder:
        build_index(world_config(), folder)
        seeds = [
            _trial(_config(arguments, own, base), folder, titles) | {"base": base}
            for base in range(1, arguments.bases + 1)
        ]
        retold = _retold(None, arguments.retold)
        result = {
            "benchmark": "recall",
            "settings": {**vars(arguments), "calibrate_on": "planted world 2"},
            "seeds": {"threshold": own, **_joined(seeds)},
        }
        if retold:
            chosen = _calibrated(arguments)
            figures = [_trial(_config(arguments, one, 0), folder, retold) for one in (own, chosen.threshold)]
            result["retold"] = {"threshold": own, **_joined(figures[:1])}
            result["retold, own threshold"] = {
                "threshold": chosen.threshold,
                "recall there": chosen.recall_low,
                **_joined(figures[1:]),
                "false_alarms": _false_alarms(chosen.threshold, arguments.timestep),
            }
    result["seconds"] = time.perf_counter() - started
    for name in ("seeds", "retold", "retold, own threshold"):
        if name in result:
            row = result[name]
            print(f"{name:24}{row['both']:5} of {row['full']:4} of {row['asked']:4}   at least {row['low']:.4f}")
    print(json.dumps(result))


def _config(arguments: argparse.Namespace, threshold: float, base: int) -> CensusConfig:
    data = world_config().model_dump()
    data["generator"] |= {"steps": arguments.steps, "samples": arguments.samples, "batch_size": 24, "base_seed": base}
    rule = ScreenConfig(
        threshold=threshold,
        timestep=arguments.timestep,
        audit_share=1e-9,  # what the audit would draw is no merit of the screen
        first_samples=arguments.first_samples,
    )
    return CensusConfig.model_validate({**data, "screen": rule})


def _trial(config: CensusConfig, folder: str, captions: list[str]) -> dict[str, int]:
    """Captions that the full scan flags, and how many of these the screened one flags."""
    full = run(config.model_copy(update={"screen": None}), folder, captions)["flagged"]
    again = run(config, folder, captions)["flagged"]
    return {"asked": len(captions), "full": len(full), "both": len(full & again)}


def _joined(trials: Sequence[dict[str, int]]) -> dict[str, Any]:
    total = {name: sum(one[name] for one in trials) for name in ("asked", "full", "both")}
    kept, count = total["both"], max(1, total["full"])
    low = float(beta.ppf(0.05, kept, count - kept + 1)) if kept else 0.0
    return {**total, "recall": kept / count, "low": low, "trials": list(trials)}


def _retold(world: str | None, count: int) -> list[str]:
    groups: dict[str, list[str]] = {}
    for row in read_truth(world).to_pylist():
        if row["group"]:
            groups.setdefault(row["group"], []).append(row["caption"])
    rng = np.random.default_rng(2026)
    return [caption for titles in groups.values() for caption in retold_titles(titles, count, rng)]


def _calibrated(arguments: argparse.Namespace) -> ScreenThreshold:
    """From the other world's retold captions, its flagged ones by a full scan, and all of its ordinary prompts."""
    world = arguments.calibrate_on
    config, captions = world_config(world), _retold(world, arguments.retold)
    ordinary = [row["caption"] for row in read_truth(world).to_pylist() if row["label"] == "NM"]
    data = config.model_dump()
    data["generator"] |= {"samples": arguments.samples, "batch_size": 24}
    with tempfile.TemporaryDirectory() as folder:
        build_index(config, folder)
        flagged = run(CensusConfig.model_validate(data), folder, captions)["flagged"]
    scores = dict(zip(captions + ordinary, _scores(world, captions + ordinary, arguments.timestep), strict=True))
    found = [score for caption, score in scores.items() if prompt_id(caption) in flagged]
    return choose_threshold(found, [scores[caption] for caption in ordinary])


def _scores(world: str | None, captions: list[str], timestep: float) -> list[float]:
    rule = ScreenConfig(threshold=0.0, timestep=timestep)
    return Screen(rule, Generator.load(world_config(world).generator)).scores(captions)


def _false_alarms(threshold: float, timestep: float) -> float:
    ordinary = [row["caption"] for row in read_truth().to_pylist() if row["label"] == "NM"]
    return float((np.asarray(_scores(None, ordinary, timestep)) >= threshold).mean())


if __name__ == "__main__":
    main()
