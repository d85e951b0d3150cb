"""This module compares two reduced runs prompt by prompt, and writes figures, a table of changes, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from memscan.census import flagged as flagged_files
from memscan.census.diff import differences, settings_that_differ
from memscan.errors import RunError
from memscan.io import storage
from memscan.records import alike
from memscan.report import Images
from memscan.report.diff import Sides, render_diff
from pipelines.reduce.panel import read_panel
from pipelines.reduce.report import read_census
from pipelines.run_folder.runs import Run

FORMAT = "memscan-diff/1"


@dataclass(frozen=True)
class Diff:
    """`document` is the content of `diff.json`, `changes` is `records.CHANGES`, `sides` are pictures by prompt id."""

    document: dict[str, Any]
    changes: pa.Table
    sides: Mapping[str, Sides] = field(default_factory=dict)


def diff_runs(before: str, after: str, *, pictures: bool = False, draw: bool = False) -> Diff:
    """Compare two reduced runs over the prompts that both processed.

    Args:
        pictures: whether the pictures of the page are gathered from the runs.
        draw: whether generations that a scan did not keep are generated again by its model (`sides.py`).

    Raises:
        RunError: one of them is not reduced, or not complete.
        InputError: they have no prompt in common.
    """
    runs = [Run.load(one) for one in (before, after)]
    censuses = [read_census(run) for run in runs]
    for run, census in zip(runs, censuses, strict=True):
        if census["partial"]:
            raise RunError(
                "the run was reduced before it was complete",
                where=run.folder.path,
                hint="resume it and reduce it again",
            )
    panels = [read_panel(one) for one in (before, after)]
    lists = [
        flagged_files.read_parquet(storage.join(one, "flagged", flagged_files.NAMES[0])) for one in (before, after)
    ]
    found = differences(*panels, *lists)
    document = {
        "format": FORMAT,
        "before": _side(before, censuses[0]),
        "after": _side(after, censuses[1]),
        "settings": settings_that_differ(*censuses),
        **found.to_json(),
        "only_before": len(panels[0].done) - found.change.common,
        "only_after": len(panels[1].done) - found.change.common,
    }
    if not pictures:
        return Diff(document, found.changes)
    from pipelines.reduce.sides import gather_sides

    same = alike(*(panel.done for panel in panels))
    return Diff(document, found.changes, gather_sides(runs, censuses, lists, found.changes, same, draw=draw))


def write_diff(folder: str, diff: Diff, *, show: Images = "show") -> list[str]:
    """Write diff.json, changes.{parquet,csv,jsonl} and diff.html into `folder`; their paths."""
    sides = {f"{side}.fingerprint": str(diff.document[side]["fingerprint"]) for side in ("before", "after")}
    paths = [storage.join(folder, "diff.json")]
    storage.make_dirs(folder)
    storage.write_json(paths[0], diff.document)
    paths += flagged_files.write_list(folder, "changes", diff.changes, sides)
    paths.append(storage.join(folder, "diff.html"))
    storage.write_atomic(paths[-1], render_diff(diff.document, diff.changes, diff.sides, show=show).encode("utf-8"))
    return paths


def _side(path: str, census: dict[str, Any]) -> dict[str, Any]:
    return {"path": path, **{key: census["run"][key] for key in ("name", "fingerprint", "ended")}}
