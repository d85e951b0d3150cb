"""This module writes pages of changes: from the previous checkpoint, and from the baseline, to each new checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from memscan.errors import MemscanError
from memscan.io import storage

DIFFS = "diffs"
Record = Mapping[str, Any]


def write_pairs(
    path: str, records: Sequence[Record], say: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, str], str]:
    """Write the pages that are not there yet into the registry at `path`.

    A pair whose runs are gone, or have no prompt in common, has no page: one line says so, and the rest continues.

    Returns:
        (slug of a checkpoint, "previous" or "baseline") -> address of its page, relative to the registry.
    """
    from pipelines.reduce.diff import diff_runs, write_diff

    found = {}
    for record, which, other in _pairs(records):
        name = f"{other['slug']}--{record['slug']}"
        folder = storage.join(path, DIFFS, name)
        if not storage.exists(storage.join(folder, "diff.html")):
            try:
                runs = [storage.join(path, str(one["run"])) for one in (other, record)]
                write_diff(folder, diff_runs(runs[0], runs[1], pictures=True))
            except MemscanError as error:
                say(f"nightly: no page of changes from {other['name']} to {record['name']}: {error}")
                continue
        found[str(record["slug"]), which] = f"{DIFFS}/{quote(name)}/diff.html"
    return found


def _pairs(records: Sequence[Record]) -> list[tuple[Record, str, Record]]:
    """Each checkpoint with what it was compared with; weights that were scanned once differ in nothing."""
    pairs: list[tuple[Record, str, Record]] = []
    for at, record in enumerate(records):
        before = {"previous": records[at - 1] if at else None, "baseline": None}
        if pinned := record["changes"].get("baseline"):
            before["baseline"] = next((one for one in records[:at] if one["name"] == pinned["name"]), None)
        seen = {record["run"]}
        for which, other in before.items():
            if other is not None and record["changes"].get(which) and other["run"] not in seen:
                seen.add(other["run"])
                pairs.append((record, which, other))
    return pairs
