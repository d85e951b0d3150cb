"""Every figure that needs a GPU, in eight minutes of one: one process, one log, one JSON object.

    python -m benchmarks.gpu_quick                    on a machine with a GPU
    python -m benchmarks.gpu_quick --rehearse         the same code on a CPU, at tiny sizes
    python -m benchmarks.gpu_quick --predict          what each part must compute and move, on an H200's peaks

Parts run in the order of their worth, each under its own limit and all under one; what a part found is written to
`--out` at once, so that a machine that is taken away leaves what it had measured. A part that fails says why and the
next one runs; the exit code is 1 then. Networks are made on the device with random weights, nothing is downloaded, and
neither Ray nor a compiler is needed before the last part. Beside each figure stand the prediction of its least time
(`_roofline.py`) and the target of docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks._gpu_parts import PARTS, Setting, release, with_peaks
from benchmarks._machine import environment
from benchmarks._predicted import PREDICTED, part_seconds, predictions

TARGETS = {
    "sd1": "4.5 times one by one, 1.4 times batched, 40 % of the peak",
    "xl": "50 % of the peak",
    "screen": "300 prompts/s, 20 times the loop",
    "chain": "denoiser 88 % of the busy time, busy 95 % of the wall time",
    "exactness": ".5 levels in float32, 2 in half precision",
    "verdicts": "99.5 % as in float32",
}


# Limits of a rehearsal are so many times as long: CPUs are slow, and this machine's may be shared.
REHEARSED = 10


class OutOfTime(Exception):
    """A part took longer than it may."""


def main(options: list[str] | None = None) -> int:
    arguments = _parse(options)
    if arguments.predict:
        found = predictions()
        _print_predictions(found)
        print(json.dumps({"benchmark": "gpu_quick", "predicted": found, "part_seconds": part_seconds(found)}))
        return 0
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch sees no GPU: give --rehearse for the same at tiny sizes on a CPU", file=sys.stderr)
        return 2
    return _measure(arguments)


def _parse(options: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU at tiny sizes")
    parser.add_argument("--predict", action="store_true", help="print what each part must compute and move, and stop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="run these only")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop beginning parts after so many minutes")
    parser.add_argument("--out", type=Path, help="write the JSON object here after every part")
    return parser.parse_args(options)


def _measure(arguments: argparse.Namespace) -> int:
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    setting = Setting(device, arguments.rehearse)
    document: dict[str, Any] = {
        "benchmark": "gpu_quick",
        "rehearsal": arguments.rehearse,
        "machine": environment(device),
        "parts": {},
    }
    started = time.perf_counter()
    for name in PARTS:
        if name not in arguments.parts:
            continue
        left = 60 * arguments.minutes - (time.perf_counter() - started)
        row = _part(name, setting, left)
        document["parts"][name] = row
        if name == "peak" and "found" in row:
            setting = with_peaks(setting, row["found"])
        document["seconds"] = time.perf_counter() - started
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _print_part(name, row)
    print(json.dumps(document))
    return int(any(row["state"] == "failed" for row in document["parts"].values()))


def _part(name: str, setting: Setting, left: float) -> dict[str, Any]:
    """One part under its limit, or the rest of the time where that is less."""
    part, limit = PARTS[name]
    if left <= 1:
        return {"state": "not begun", "why": "no time was left"}
    begun = time.perf_counter()
    row: dict[str, Any]
    try:
        with _limited(min(limit * (REHEARSED if setting.rehearse else 1), left)):
            row = {"state": "done", "found": part(setting)}
    except OutOfTime as error:
        row = {"state": "out of time", "why": str(error)}
    except Exception as error:  # of any kind: the next parts are to run, and the trace is in the log
        traceback.print_exc()
        row = {"state": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
    row["seconds"] = time.perf_counter() - begun
    if name in TARGETS:
        row["target"] = TARGETS[name]
    release(setting)
    return row


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block when so many seconds are over; a kernel that runs is waited for."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _print_part(name: str, row: dict[str, Any]) -> None:
    said = json.dumps(row["found"]) if "found" in row else row["why"]
    print(f"{name:10} {row['state']:12} {row.get('seconds', 0):7.1f} s  {said[:400]}", flush=True)


def _print_predictions(found: dict[str, dict[str, float]]) -> None:
    print(f"{'part':34}{'TFLOP':>10}{'GB moved':>10}{'kernels':>9}{'least s':>9}{'GiB held':>10}")
    for name, row in found.items():
        print(
            f"{name:34}{row['tflop']:10.2f}{row['gigabytes']:10.1f}{row['kernels']:9.0f}{row['seconds']:9.3f}"
            f"{row['gib']:10.1f}"
        )
    assert set(found) == set(PREDICTED)
    print("least seconds of whole parts, and their limits:")
    for part, seconds in part_seconds(found).items():
        print(f"{part:34}{seconds:10.1f}{PARTS[part][1]:10.0f}")


if __name__ == "__main__":
    sys.exit(main())
