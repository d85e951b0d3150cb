"""What two runs must agree on: the tables of a disturbed chain against those of an undisturbed one.

Ids, classes, matches and counts are equal. Scores may differ by `CLOSE`: a row that is done again may be computed in a
batch of another size, and matrix products of another size round differently in the last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from memscan.mitigation.card import CARD

CLOSE = 1e-4
_OF_A_ROW = ("prompt_id", "caption", "count", "source", "row", "status", "reason")
_OF_A_GENERATION = ("sample", "seed", "label", "match_id")
_SCORES = ("foreground", "background", "whole", "similarity")
_FLAGGED = ("prompt_id", "caption", "verdict", "label", "cluster", "match_ids", "component")


def differences(one: Path, other: Path, stages: tuple[str, ...]) -> list[str]:
    """What is not as it should be in `other`; empty where all is equal."""
    looks = {"index": _index, "scan": _scan, "reduce": _reduce, "mitigate": _mitigate}
    return [f"{stage}: {told}" for stage in stages for told in looks[stage](one, other)] + _litter(other)


def _index(one: Path, other: Path) -> list[str]:
    """Bytes of every file of the index, whatever workers made it."""
    mine, theirs = (_hashes(folder / "index") for folder in (one, other))
    return [f"{name} differs" for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _scan(one: Path, other: Path) -> list[str]:
    found = []
    manifests = [json.loads((folder / "run" / "run.json").read_text()) for folder in (one, other)]
    if manifests[1]["state"] != "complete":
        found.append(f"the run is {manifests[1]['state']}")
    if manifests[0]["counts"] != manifests[1]["counts"]:
        found.append(f"counts {manifests[1]['counts']}, not {manifests[0]['counts']}")
    tables = [pq.read_table(folder / "run" / "census").to_pylist() for folder in (one, other)]
    ids = Counter(row["prompt_id"] for row in tables[1])
    found += [f"{name} is there {count} times" for name, count in ids.items() if count != 1]
    rows = [{row["prompt_id"]: row for row in table} for table in tables]
    found += [f"{name} is missing" for name in rows[0].keys() - rows[1].keys()]
    found += [f"{name} is foreign" for name in rows[1].keys() - rows[0].keys()]
    for name in sorted(rows[0].keys() & rows[1].keys()):
        found += [f"{name}: {told}" for told in compare_rows(rows[0][name], rows[1][name])]
    return found


def compare_rows(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two rows of a census."""
    found = [f"{name} {other[name]!r}, not {one[name]!r}" for name in _OF_A_ROW if one[name] != other[name]]
    pairs = one["generations"], other["generations"]
    facts = [[[generation[name] for name in _OF_A_GENERATION] for generation in made] for made in pairs]
    if facts[0] != facts[1]:
        return [*found, f"generations {facts[1]}, not {facts[0]}"]
    for mine, theirs in zip(*pairs, strict=True):
        scores = [(mine[name], theirs[name]) for name in _SCORES]
        found += [f"scores {a} and {b}" for a, b in scores if a != b and (a is None or b is None or abs(a - b) > CLOSE)]
    return found


def _reduce(one: Path, other: Path) -> list[str]:
    found = []
    documents = [json.loads((folder / "run" / "census.json").read_text()) for folder in (one, other)]
    found += [f"{key} differ" for key in ("counts", "clusters") if documents[0][key] != documents[1][key]]
    for name in ("flagged", "removal"):
        tables = [pq.read_table(folder / "run" / "flagged" / f"{name}.parquet") for folder in (one, other)]
        columns = [column for column in tables[0].column_names if column in _FLAGGED or name == "removal"]
        rows = [_in_order(table.select(columns).to_pylist()) for table in tables]
        if rows[0] != rows[1]:
            found.append(f"the {name} list differs")
    if not (other / "run" / "report.html").is_file():
        found.append("there is no report")
    return found


def _in_order(rows: list[dict[str, Any]]) -> list[str]:
    """Rows, and the matches in each, in an order of their own: scores that are equal but for rounding change places."""
    return sorted(repr([sorted(cell) if isinstance(cell, list) else cell for cell in row.values()]) for row in rows)


def _mitigate(one: Path, other: Path) -> list[str]:
    folders = [folder / "run" / "mitigated" / "nemo_c" for folder in (one, other)]
    cards = [json.loads((folder / CARD).read_text()) for folder in folders]
    found = [f"{key} differ" for key in ("units", "changed") if cards[0][key] != cards[1][key]]
    weights = [_hashes(folder / "unet") for folder in folders]
    return [*found, *(["the weights differ"] if weights[0] != weights[1] else [])]


def _litter(folder: Path) -> list[str]:
    """What only an unfinished job may leave."""
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.endswith(".work")]
    left += [
        path
        for path in (folder / "index.build", folder / "run" / "journal", folder / "run" / ".reduce")
        if path.exists()
    ]
    leases = sorted((folder / "run" / "lease").glob("*.json"))
    held = leases and not json.loads(leases[-1].read_text())["released"]
    return [f"left behind: {path.relative_to(folder)}" for path in left] + (["the lease is held"] if held else [])
