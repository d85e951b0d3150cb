"""This module repairs an index: it goes back to the last version whose files are all as their manifest says.

A file is damaged if it was lost, altered or, before changes were compare-and-swap, overwritten by a simultaneous second
change. The intact version becomes the next version, so nothing is overwritten. A takedown is never undone silently: ids
that are in a readable file of removed references are removed again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.errors import IndexLoadError, MemscanError, RunError
from memscan.index.change import REMOVED, read_ids, remove
from memscan.index.manifest import MANIFEST_FILE, Manifest, version_file, versions
from memscan.io import storage


@dataclass(frozen=True)
class Repaired:
    """This says what a repair did.

    Attributes:
        manifest: the version that counts now.
        good: the version that it has the content of; the current one where nothing was damaged.
        dropped: versions that were given up, with what is wrong with each, newest first.
        removed: takedowns of versions given up that were made again.
    """

    manifest: Manifest
    good: int
    dropped: dict[int, str]
    removed: int


def repair(folder: str) -> Repaired:
    """Make the last good version the one that counts.

    Raises:
        IndexLoadError: no version is good: the index is to be built again.
        RunError: another process changed the index in the meantime.
    """
    numbers = versions(folder).numbers()
    dropped: dict[int, str] = {}
    for number in reversed(numbers):
        try:
            manifest = Manifest.load(folder, number)
            manifest.verify(folder)
        except MemscanError as error:
            dropped[number] = f"{error.what} ({error.where})"
            continue
        return _restored(folder, manifest, number, numbers[-1], dropped)
    if numbers:
        first = dropped[numbers[-1]]
        raise IndexLoadError(f"none of {len(numbers)} versions is intact; the last one: {first}", where=folder)
    raise IndexLoadError("no index here (it has no version)", where=folder, hint="build one first")


def _restored(folder: str, manifest: Manifest, number: int, last: int, dropped: dict[int, str]) -> Repaired:
    if not dropped:
        storage.write_atomic(storage.join(folder, MANIFEST_FILE), storage.read_bytes(version_file(folder, number)))
        return Repaired(manifest, number, {}, 0)
    restored = dataclasses.replace(manifest, version=last + 1)
    if not restored.swap(folder):
        raise RunError("was changed by somebody else meanwhile", where=folder, hint="run it again")
    lost = _lost_takedowns(folder, restored)
    before = restored.removed_count
    if lost:
        restored = remove(folder, lost)
    return Repaired(restored, number, dropped, restored.removed_count - before)


def _lost_takedowns(folder: str, manifest: Manifest) -> list[str]:
    """Return ids of the index that some file of removed references names, whatever version it belonged to."""
    place = storage.join(folder, "removed")
    if not storage.is_dir(place):
        return []
    named: set[str] = set()
    for file in storage.list_files(place, ".parquet"):
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(file)), schema=REMOVED)
            named |= set(table["reference_id"].to_pylist())
        except (pa.ArrowException, OSError, ValueError):
            continue  # the damaged file itself
    held: set[str] = set()
    for shard in manifest.shards if named else ():
        held |= named.intersection(read_ids(folder, shard).to_pylist())
    return sorted(held)
