"""Seconds and memory of `memscan reduce` over synthetic censuses, beside a loop over the rows in one process.

The runs are as a scan leaves them (`benchmarks.synthetic_run`); one prompt in twenty is flagged. Every reduce runs in a
process of its own: the driver's memory is that process's peak resident size, and what its children (Ray's processes and
workers, together) held at most is listed beside it. The slope is of log seconds against log rows.

The loop is what a script without memscan would do: read the files as a table, judge each row in turn, list the flagged
ones. It makes no clusters, no groups of near-duplicates and no report, so the ratio is of judging alone (--loop rows).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.synthetic_run import BLOCK, write_synthetic_run
from pipelines.run_folder.runs import Run

TARGET_MIB = 2048
TARGET_SLOPE = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--block", type=int, default=BLOCK, help="rows of a census file, as the scan's blocks are")
    parser.add_argument("--loop", type=int, default=100_000, help="rows of the plain loop; 0 leaves it out")
    parser.add_argument("--processes", type=int, default=1, help="that write the runs")
    parser.add_argument("--folder", default=None, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--child", choices=("reduce", "judge", "loop"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.child, Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        figures = {rows: _measure(folder / str(rows), rows, arguments) for rows in arguments.rows}
        loop = _loop(folder, arguments) if arguments.loop else None
    _show(figures, loop)
    slope = _slope({rows: row["seconds"] for rows, row in figures.items()})
    peak = max(row["driver_mib"] for row in figures.values())
    result = {
        "benchmark": "reduce",
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("child", "folder")},
        "figures": figures,
        "slope": slope,
        "driver_mib": peak,
        "reached": {"slope": slope is None or slope <= TARGET_SLOPE, "driver": peak < TARGET_MIB},
        "judging": loop,
        "ratio": loop["loop"] / loop["ours"] if loop else None,
    }
    print(json.dumps(result))


def _show(figures: dict[int, dict[str, Any]], loop: dict[str, Any] | None) -> None:
    names = ["rows", "flagged", "files", "seconds", "driver MiB", "children MiB", "report MiB"]
    print("".join(f"{name:>14}" for name in names))
    for rows, row in figures.items():
        values = [f"{rows:,}", f"{row['flagged']:,}", f"{row['files']:,}", f"{row['seconds']:.1f}"]
        values += [f"{row[name]:.0f}" for name in ("driver_mib", "children_mib")] + [f"{row['report_mib']:.1f}"]
        print("".join(f"{value:>14}" for value in values))
    slope = _slope({rows: row["seconds"] for rows, row in figures.items()})
    if slope is not None:
        print(f"log-log slope of seconds against rows: {slope:.2f} (target: at most {TARGET_SLOPE})")
    if loop:
        print(f"judging {loop['rows']:,} rows: {loop['ours']:.1f} s here, {loop['loop']:.1f} s in a loop")


def _slope(seconds: dict[int, float]) -> float | None:
    if len(seconds) < 2:
        return None
    rows, values = (np.log(np.array(list(one), dtype=float)) for one in (seconds.keys(), seconds.values()))
    return float(np.polyfit(rows, values, 1)[0])


def _measure(folder: Path, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    _written(folder, rows, arguments)
    return _run_child("reduce", folder)


def _written(folder: Path, rows: int, arguments: argparse.Namespace) -> None:
    if not (folder / "run.json").exists() or Run.load(str(folder)).state != "complete":
        write_synthetic_run(folder, rows, block=arguments.block, processes=arguments.processes)


def _loop(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    run = folder / str(arguments.loop)
    _written(run, arguments.loop, arguments)
    seconds = {name: _run_child(kind, run)["seconds"] for name, kind in (("ours", "judge"), ("loop", "loop"))}
    return {"rows": arguments.loop, **seconds}


def _run_child(kind: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.reduce", "--child", kind, "--folder", str(folder)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err)
        children = 0.0
        while child.poll() is None:
            children = max(children, sum(resident_mib(one) for one in descendants(child.pid)))
            time.sleep(0.2)
        for stream in (out, err):
            stream.seek(0)
        if child.returncode:
            raise SystemExit(err.read())
        found: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return {**found, "children_mib": children}


def descendants(pid: int) -> list[int]:
    """Every process below one (Linux); one that ends meanwhile is left out."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def resident_mib(pid: int) -> float:
    """Resident memory of a process; pages that it shares with others count in full."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, IndexError):
        return 0.0


def _child(kind: str, folder: Path) -> None:
    import pipelines.reduce.job  # importing is not what is measured
    from pipelines.run_folder.results import census_files

    files = len(census_files(Run.load(str(folder)), False))
    started = time.perf_counter()
    if kind == "reduce":
        flagged = pipelines.reduce.job.reduce_run(str(folder))["counts"]["flagged"]
    else:
        flagged = _judged(folder) if kind == "judge" else _judged_in_a_loop(folder)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    page = folder / "report.html"
    size = page.stat().st_size / 2**20 if page.exists() else 0.0
    figures = {"flagged": flagged, "files": files, "seconds": seconds, "driver_mib": peak, "report_mib": size}
    print(json.dumps(figures))


def _judged(folder: Path) -> int:
    from pipelines.reduce.verdicts import judge_files
    from pipelines.run_folder.results import census_files

    run = Run.load(str(folder))
    config = run.config()
    return judge_files(run, census_files(run, False), config.verdict, config.metric, False)[1].num_rows


def _judged_in_a_loop(folder: Path) -> int:
    from memscan.census.verdict import verdict

    config = Run.load(str(folder)).config()
    rows = pq.read_table(folder / "census").to_pylist()
    done = (row for row in rows if row["status"] == "done")
    return sum(verdict(row["generations"], config.verdict, config.metric).flagged for row in done)


if __name__ == "__main__":
    main()
