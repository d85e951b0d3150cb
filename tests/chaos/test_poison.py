"""Rows that raise, hang and kill among many, through the whole chain: all accounted for, neighbours kept.

How deadly rows are found is `tests/pipelines/run_folder/test_journal.py`'s, in seconds; this is Ray's share of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.run_folder.runs import Run
from tests.chaos.faults import POISON

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = 120
WATCHDOG = 8  # seconds; a healthy block takes a fraction of one


@pytest.mark.ray
@pytest.mark.long
def test_three_poisoned_rows_take_no_neighbour_with_them(tiny_world: Any, complete_run: Path, tmp_path: Path) -> None:
    captions = [f"caption {number}" for number in range(ROWS - 3)]
    for place, caption in zip((15, 50, 51), POISON, strict=True):  # two of them side by side, in one block
        captions.insert(place, caption)
    (tmp_path / "prompts.txt").write_text("\n".join(captions))
    config = tiny_world.config(
        tmp_path / "run",
        prompts__paths=[str(tmp_path / "prompts.txt")],
        index__path=str(complete_run / "index"),
        index__source=None,
        generator__samples=1,
        generator__steps=1,
        generator__batch_size=10,
        resources__prompts_per_block=10,
        resources__samplers=1,
        resources__watchdog_seconds=WATCHDOG,
    )
    (tmp_path / "census.json").write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    result = subprocess.run(
        [sys.executable, str(HERE / "poisoned_scan.py"), str(tmp_path / "census.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = Run.load(str(tmp_path / "run"))
    assert run.state == "complete"
    counts = run.progress()
    assert (counts.rows, counts.done, counts.rejected) == (ROWS, ROWS - 3, 3)
    rejects = pq.read_table(tmp_path / "run" / "rejects").to_pylist()
    assert {row["caption"]: row["reason"] for row in rejects} == POISON
    assert not list((tmp_path / "run" / "journal").rglob("*.json")) if (tmp_path / "run" / "journal").exists() else True
