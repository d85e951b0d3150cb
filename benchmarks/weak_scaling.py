"""Weak scaling of the scan's chain over stub GPUs: as many rows for every worker, more and more workers.

The GPUs are logical resources of Ray and the stage only SLEEPS, so this measures what Ray, the driver and the writer
add, not a model. Blocks, pool of actors (one per GPU), writer and commits are the product's. Time runs from the first
block to the last commit, once all workers are up. Efficiency is the time of one worker over that of N. "stagger" is
how much later than the first the last worker had its first block: N processes that share a few cores begin slowly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import synthetic_models
from benchmarks.scale import configure

ROOT = str(Path(__file__).resolve().parents[1])  # workers import this package too
BLOCK = 10
UP_SECONDS = 300  # for all workers to come up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=300, help="for every worker")
    parser.add_argument("--row-ms", type=float, default=100.0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_child(arguments.child, Path(arguments.folder))))
        return
    found = {count: _measure(count, arguments) for count in arguments.workers}
    seconds = {count: one["seconds"] for count, one in found.items()}
    first, alone = next(iter(seconds.items()))
    efficiency = {count: alone / value for count, value in seconds.items()}
    print(f"{'workers':>10}{'rows':>10}{'seconds':>10}{'stagger':>10}{'efficiency':>12}")
    for count, one in found.items():
        figures = f"{one['seconds']:10.2f}{one['stagger']:10.2f}{efficiency[count]:12.3f}"
        print(f"{count:10}{count * arguments.rows:10}{figures}")
    print(f"sleep alone: {arguments.rows * arguments.row_ms / 1000:.2f} s; efficiency against {first} worker(s)")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("child", "folder")}
    stagger = {count: one["stagger"] for count, one in found.items()}
    result = {"benchmark": "weak_scaling", "stage": "SLEEPS", "settings": settings}
    result |= {"seconds": seconds, "stagger": stagger}
    print(json.dumps(result | {"efficiency": efficiency, "ratio": efficiency[max(efficiency)]}))


def _measure(count: int, arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        configure(
            folder,
            folder / "index",
            count * arguments.rows,
            part_size=arguments.rows,
            workers=None,
            block=BLOCK,
            device="auto",
        )
        stub = {"SYNTHETIC_MS": str(arguments.row_ms), "SYNTHETIC_BARE": "1", "SYNTHETIC_READY": str(folder / "ready")}
        command = [sys.executable, "-m", "benchmarks.weak_scaling", "--child", str(count), "--folder", scratch]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **stub, "PYTHONPATH": ROOT}
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("{"))  # Ray may say something as it ends
    return dict(json.loads(told))


def _child(count: int, folder: Path) -> dict[str, float]:
    import ray
    import ray.data

    from pipelines.ray.session import ray_session, worker_environment

    with worker_environment():
        ray.init(
            address="local",
            num_cpus=count + 2,
            num_gpus=count,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "benchmarks.synthetic_models.install"},
        )
        ray.data.DataContext.get_current().wait_for_min_actors_s = UP_SECONDS
        with ray_session(folder / "logs"):
            return _run(count, folder)


def _run(count: int, folder: Path) -> dict[str, float]:
    """Seconds from the first block to the last commit, and between the workers' first blocks."""
    from memscan.config import load_config
    from memscan.prompts.table import read_prompts
    from pipelines.ray.layout import PoolLayout
    from pipelines.ray.session import Machine
    from pipelines.ray.stage import StageSetup, silent
    from pipelines.run_folder.runs import Run
    from pipelines.scan.job import chain
    from pipelines.scan.waves import Parts, Target, follow

    config = load_config(folder / "census.json")
    run = Run.open(config, {"models.generator": "generator:synthetic@000000000000:sleeps"})
    run.write_prompts(read_prompts(config.prompts), config.part_size)
    machine = Machine(cpus=count + 2, gpus=count, cores=count + 2, local=True)
    layout = PoolLayout.of(config, machine, int(run.manifest["prompts"]["distinct"]))
    assert (layout.samplers, layout.gpus) == (count, 1.0)
    parts = Parts.of({number: run.todo(number) for number in run.parts})
    report: Any = silent
    # The GPUs are names for Ray to count: the stage sleeps on a CPU.
    target = Target(run.folder.census, run.epoch, run.fingerprint)
    written = partial(chain, parts, StageSetup(config, "cpu", 1), layout, report, target)
    committed: list[float] = []

    def commit(part: int) -> None:
        run.commit(part)
        committed.append(time.time())

    follow(written, parts.counts, commit)
    begun = synthetic_models.ready_times(folder / "ready")
    assert run.finish().done == parts.num_rows
    return {"seconds": committed[-1] - begun[0], "stagger": begun[-1] - begun[0]}


if __name__ == "__main__":
    main()
