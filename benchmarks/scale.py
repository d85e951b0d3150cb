"""A census of many prompts with SYNTHETIC models (`synthetic_models.py`): rows/s, driver's memory, slope, overhead.

All but the three networks is the product: prompt file, parts, Ray Data, search in an index of 2,000 references, FB-Mem
on a canvas of 32, records, Parquet, commit records. Every size is a process of its own, so that its peak resident
memory is the driver's; workers are not in it. "after start-up" leaves out the time from the fixed prompts to the first
worker that is ready, which does not depend on the prompts. Seconds of CPU are those of the driver, Ray and the workers
together, from that worker on: other work on the machine stretches the time, but hardly them.

The overhead is that of the chain on one worker over a bare loop that calls the very same stage on the same blocks and
writes the same files, with --work-ms of work in every row (a sleep).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import synthetic_models
from memscan.config import CensusConfig
from memscan.planted.world import world_config

ROOT = str(Path(__file__).resolve().parents[1])  # workers import this package too
SAMPLE_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=None, help="default: one per core")
    parser.add_argument("--part-size", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=500, help="prompts of a block")
    parser.add_argument("--overhead", type=int, default=300, help="rows of the comparison with a loop; 0 leaves it out")
    parser.add_argument("--work-ms", type=float, default=100.0)
    parser.add_argument("--child", choices=("scan", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.child, Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        synthetic_models.write_references(str(folder / "index"))
        overhead = _overhead(folder, arguments) if arguments.overhead else None
        figures = {count: _measure(folder, count, arguments) for count in arguments.prompts}
    columns = ("prompts", "seconds", "after start-up", "rows/s", "CPU seconds", "driver MiB", "at the start")
    print("".join(f"{name:>16}" for name in columns))
    for count, row in figures.items():
        names = ("seconds", "after_startup", "rows_per_second", "cpu_seconds", "peak_mib", "start_mib")
        values = [row[name] for name in names]
        print(f"{count:16,}" + "".join(f"{value:16,.1f}" for value in values))
    slope = _slope({count: row["after_startup"] for count, row in figures.items()})
    cpu_slope = _slope({count: row["cpu_seconds"] for count, row in figures.items()})
    if slope is not None:
        print(f"log-log slope against prompts: {slope:.3f} of seconds after start-up, {cpu_slope:.3f} of CPU seconds")
    if overhead:
        print(f"{arguments.work_ms:g} ms per row: chain {overhead['chain']:.2f} s, loop {overhead['loop']:.2f} s")
        print(f"overhead of the chain: {100 * overhead['share']:.1f} %")
    result = {"benchmark": "scale", "models": "SYNTHETIC", "settings": vars(arguments), "figures": figures}
    slopes = {"slope": slope, "cpu_slope": cpu_slope}
    print(json.dumps(result | slopes | {"overhead": overhead, "ratio": overhead and 1 + overhead["share"]}))


def _measure(folder: Path, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    run = folder / str(count)
    sizes = {"part_size": arguments.part_size, "block": arguments.block}
    configure(run, folder / "index", count, workers=arguments.workers, **sizes)
    found = _run_child("scan", run)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def _overhead(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Both with one worker and blocks of ten rows, as a GPU that takes a tenth of a second for a row would have."""
    rows, run = arguments.overhead, folder / "overhead"
    configure(run, folder / "index", rows, part_size=rows, workers=1, block=10)
    seconds = {kind: _run_child(kind, run, arguments.work_ms)["work_seconds"] for kind in ("scan", "loop")}
    return {"chain": seconds["scan"], "loop": seconds["loop"], "share": seconds["scan"] / seconds["loop"] - 1}


def configure(
    run: Path, index: Path, count: int, *, part_size: int, workers: int | None, block: int, device: str = "cpu"
) -> None:
    """Write the prompts and the configuration (census.json) of a census with synthetic models into a folder."""
    (run / "ready").mkdir(parents=True)
    (run / "prompts.txt").write_text("\n".join(synthetic_models.captions(count)), encoding="utf-8")
    data = world_config().model_dump(mode="json")
    data |= {"name": f"synthetic-{count}", "out": str(run / "census"), "part_size": part_size, "screen": None}
    data["prompts"] = {"paths": [str(run / "prompts.txt")]}
    data["generator"] |= {"samples": 1, "batch_size": block}
    data["index"] = {"path": str(index), "top_k": 1}
    data["metric"] = {
        "variant": "region",
        "canvas": synthetic_models.SIDE,
        "foreground_threshold": 0.7,
        "background_threshold": 0.7,
    }
    data["resources"] = {"device": device, "samplers": workers, "prompts_per_block": block}
    (run / "census.json").write_text(CensusConfig.model_validate(data).model_dump_json(), encoding="utf-8")


def _run_child(kind: str, run: Path, work_ms: float = 0.0) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": ROOT,
        "SYNTHETIC_MS": str(work_ms),
        "SYNTHETIC_READY": str(run / "ready"),
    }
    command = [sys.executable, "-m", "benchmarks.scale", "--child", kind, "--folder", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(kind: str, run: Path) -> None:
    from memscan.config import load_config

    config = load_config(run / "census.json")
    print(json.dumps(_scan(config, run) if kind == "scan" else _loop(config)))


def _scan(config: CensusConfig, run: Path) -> dict[str, Any]:
    import ray

    from pipelines.ray.session import cores, worker_environment
    from pipelines.scan.job import scan

    with worker_environment():
        ray.init(
            address="local",
            num_cpus=max(2, cores()),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "benchmarks.synthetic_models.install"},
        )
        memory, told = Watch(), []
        with memory:
            started = time.time()
            counts = scan(config, lambda text: told.append(time.time()))
            ended = time.time()
    expected = -(-counts.rows // synthetic_models.PRINT_EVERY)
    assert counts.rejected == 0, counts
    assert (counts.labels or {}).get("VM") == expected, counts
    ready = synthetic_models.ready_times(run / "ready")[0]
    after = (ended - started) - (ready - told[0])
    return {
        "prompts": counts.rows,
        "seconds": ended - started,
        "reading_seconds": told[0] - started,
        "startup_seconds": ready - told[0],
        "work_seconds": ended - ready,
        "after_startup": after,
        "rows_per_second": counts.rows / after,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "start_mib": memory.at(ready)[0],
        "cpu_seconds": memory.at(ended)[1] - memory.at(ready)[1],
        "memory_mib": memory.shape(),
    }


def _loop(config: CensusConfig) -> dict[str, float]:
    """What a script without Ray would do with the same stage: rows, stage, files."""
    import pyarrow as pa

    from memscan.prompts.table import read_prompts
    from pipelines.ray.stage import StageSetup
    from pipelines.scan.stages import Census
    from pipelines.scan.waves import Parts, Target, blocks_of, write_rows

    synthetic_models.install()
    table: pa.Table = read_prompts(config.prompts).table
    with tempfile.TemporaryDirectory() as folder:
        stage = Census(StageSetup(config, "cpu", 1, str(config.index.path)))
        started = time.time()
        for block in blocks_of(Parts.of({0: table}), config.resources.prompts_per_block):
            write_rows(stage(block), Target(folder))
        return {"work_seconds": time.time() - started}


class Watch:
    """Resident memory of this process, and processor time of it and of all that it started, looked at every second."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, tuple[float, float]]] = []
        self._times: dict[int, float] = {}  # of a process that has ended, as of when it was last seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, when: float) -> tuple[float, float]:
        """MiB and seconds of CPU at a time, seconds since the epoch."""
        return min(self._seen, key=lambda seen: abs(seen[0] - when))[1]

    def shape(self) -> list[float]:
        """MiB at the start, each quarter of the time, and the end."""
        last = len(self._seen) - 1
        return [round(self._seen[last * quarter // 4][1][0]) for quarter in range(5)]

    def _follow(self) -> None:
        stopped = False
        while not stopped:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            own = psutil.Process()
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    times = process.cpu_times()
                    self._times[process.pid] = times.user + times.system
            mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self._seen.append((time.time(), (mib, sum(self._times.values()))))
            stopped = self._stop.wait(SAMPLE_SECONDS)


def _slope(seconds: dict[int, float]) -> float | None:
    if len(seconds) < 2:
        return None
    logs = [math.log(count) for count in seconds], [math.log(value) for value in seconds.values()]
    return float(np.polyfit(*logs, 1)[0])


if __name__ == "__main__":
    main()
