"""The benchmarks of scale at a tiny size: every prompt once, what is memorised found, several parts and workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},  # as a user calls it
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_scale() -> None:
    """The benchmark itself asserts that nothing was rejected and that exactly the memorised prompts are VM.

    One worker: a second one only costs another import of torch here, and `test_weak_scaling` has two.
    """
    sizes = ("--prompts", "300", "--part-size", "100", "--block", "70", "--workers", "1")
    found = benchmark("scale", *sizes, "--overhead", "0")
    assert found["models"] == "SYNTHETIC"
    figures = found["figures"]["300"]
    assert figures["prompts"] == 300
    assert min(figures["peak_mib"], figures["cpu_seconds"]) > 0


@pytest.mark.ray
@pytest.mark.slow
def test_weak_scaling() -> None:
    """One stub GPU a worker by Ray's own resources; the run of every size ends complete, or the benchmark fails."""
    found = benchmark("weak_scaling", "--workers", "2", "--rows", "20", "--row-ms", "5")
    assert set(found["seconds"]) == {"2"}
    assert found["seconds"]["2"] >= 0.1
