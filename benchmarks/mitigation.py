"""Searches a second: NeMo's search for the planted prompts of the shipped world, by one Ray Train worker and by two.

What is timed is the shared part of the job as `memscan mitigate` runs it: every worker has loaded its model and
calibrated the score, then the searches are shared out, and the clock stops when every worker has all outcomes. Both
must find the same units. The target on two idle cores is 1.6 times the searches a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.targets import Target
from memscan.planted.world import shipped_world, world_config
from pipelines.mitigate.search import Bench, SearchJob
from pipelines.ray.session import cores, ray_session
from pipelines.ray.training import TrainingWorkers, read_state, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder) / "logs"):
        for workers in arguments.workers:
            job = _job(arguments.prompts, arguments.seeds)
            name = f"bench-{workers}"
            _, checkpoint = train(
                timed_loop, {"job": job}, storage=Path(folder), name=name, workers=workers, gpus=False
            )
            assert checkpoint is not None
            found[workers] = read_state(checkpoint)
    first = found[arguments.workers[0]]
    print(f"{'workers':>8}{'seconds':>10}{'searches/s':>12}{'ratio':>8}")
    for workers, one in found.items():
        rate = arguments.prompts / one["seconds"]
        print(f"{workers:8}{one['seconds']:10.1f}{rate:12.3f}{first['seconds'] / one['seconds']:8.2f}")
    result = {
        "benchmark": "mitigation",
        "settings": {**vars(arguments), "cores": cores()},
        "seconds": {workers: one["seconds"] for workers, one in found.items()},
        "ratio": first["seconds"] / found[arguments.workers[-1]]["seconds"],
        "same_units": all(one["units"] == first["units"] for one in found.values()),
    }
    print(json.dumps(result))


def timed_loop(config: dict[str, Any]) -> None:
    """Calibrate, wait for everybody, search."""
    job: SearchJob = config["job"]
    workers = TrainingWorkers.join()
    bench = Bench(job)
    bench.calibrate(workers)
    workers.gather(None)
    started = time.perf_counter()
    outcomes = workers.shared(len(job.targets), lambda at: bench.find(bench.samples(job.targets[at])[0]))
    state = {"seconds": time.perf_counter() - started, "units": [one["units"] for one in outcomes]}
    workers.report_state({"seconds": state["seconds"]}, state)


def _job(prompts: int, seeds: int) -> SearchJob:
    rows = pq.read_table(shipped_world() / "truth.parquet").to_pylist()
    planted = [row for row in rows if row["group"]]
    ordinary = [row["caption"] for row in rows if not row["group"]][:60]
    targets = tuple(
        Target(row["prompt_id"], row["caption"], row["label"], row["group"], tuple(row["reference_ids"]))
        for row in planted[:: max(1, len(planted) // prompts)][:prompts]
    )
    settings = MitigationSettings(
        method="nemo",
        blocks=("down_blocks", "mid_block", "up_blocks"),
        steps=10,
        seeds=seeds,
        threshold_prompts=20,
        rank="excess",
        extend=0.9,
    )
    return SearchJob(world_config(None).generator, settings, targets, tuple(ordinary), "cpu", 1)


if __name__ == "__main__":
    main()
