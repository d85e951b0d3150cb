"""The benchmarks of scale at a tiny size: every prompt once, what is memorised found, several parts and workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale, synthetic_models

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


@pytest.mark.long
def test_scale(tmp_path: Path) -> None:
    """The loop beside the census: configuration, synthetic networks, the stage and its files, without Ray.

    Ray under the same networks is `test_weak_scaling`'s.
    """
    synthetic_models.write_references(str(tmp_path / "index"))
    scale.configure(tmp_path / "run", tmp_path / "index", 60, part_size=60, workers=1, block=20)
    found = scale._run_child("loop", tmp_path / "run", 10.0)
    assert found["work_seconds"] >= 0.6  # of 10 ms for each row


@pytest.mark.ray
@pytest.mark.long
def test_weak_scaling() -> None:
    """One stub GPU a worker by Ray's own resources; the run of every size ends complete, or the benchmark fails."""
    found = benchmark("weak_scaling", "--workers", "2", "--rows", "20", "--row-ms", "5")
    assert set(found["seconds"]) == {"2"}
    assert found["seconds"]["2"] >= 0.1
