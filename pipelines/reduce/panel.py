"""This module reads the results of a reduced run for each prompt of its panel, to compare them with another run."""

from __future__ import annotations

import pyarrow.compute as pc

from memscan.census.trend import Panel
from memscan.io import storage
from memscan.records import Status
from pipelines.reduce.report import read_census
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table


def read_panel(out: str) -> Panel:
    """Return a reduced run's verdicts, prompt by prompt."""
    run = Run.load(out)
    done: set[str] = set()
    for number in run.parts:
        for file in run.files(number):
            rows = read_table(file, ["prompt_id", "status"])
            done.update(rows.filter(pc.equal(rows["status"], Status.DONE.value))["prompt_id"].to_pylist())
    flagged = read_table(storage.join(out, "flagged", "flagged.parquet"), ["prompt_id", "label"])
    labels = dict(zip(flagged["prompt_id"].to_pylist(), flagged["label"].to_pylist(), strict=True))
    return Panel(frozenset(done), labels, float(read_census(run)["severity"]["mean_generation"] or 0.0))
