"""This module changes an index.

Each change makes a new version of existing files and new files.

Appended shards are copies of the same template. Removed references (takedowns) stay in their shard but are in no
answer, until the index is compacted: shards that hold some are written again without them. `prune` removes
files that no kept version names; it must not be run while a census uses an older version. It also removes what was left
by a change that lost its race or was killed, once this is so old that no change can still be about to name it.

Each change is a compare-and-swap on the version: it is made from the current version, and becomes the next one only if
that version is still the current one. If another change came first, it is made again from the result of that change.
So two simultaneous takedowns become two versions, of which the later one has both, and a takedown during a compaction
is kept. The names of new files come from their content, so the files of a change that lost disturb nobody.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.errors import InputError, RunError
from memscan.index.local_copy import stage_file, stage_shard, stage_template
from memscan.index.manifest import (
    IDS_FILE,
    REFERENCES_FILE,
    Manifest,
    Shard,
    describe,
    version_file,
    versions,
)
from memscan.index.references import ROW_GROUP, map_ids
from memscan.index.shards import OpenShard, read_template, write_shard
from memscan.index.vectors import Rows, Vectors
from memscan.io import storage

ATTEMPTS = 12  # of a change that others come before each time
ORPHAN_SECONDS = 24 * 3600.0  # a compaction, from its first file to its version, takes minutes or hours
BUILD_ENDING = ".build"  # beside an index, of a build or an addition that is not through

REMOVED = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # in its shard
    ]
)


def removed_rows(folder: str, manifest: Manifest) -> list[Rows]:
    """Return, by shard, its rows (counted from 0) that are in no answer, in ascending order. Raises IntegrityError."""
    by_shard: dict[str, list[int]] = {}
    table = _removed(folder, manifest)
    for shard, row in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True):
        by_shard.setdefault(shard, []).append(row)
    return [np.array(sorted(by_shard.get(shard.name, [])), np.int64) for shard in manifest.shards]


def read_ids(folder: str, shard: Shard) -> pa.Array:
    """Return ids of a shard by row, removed ones included. Raises IntegrityError, IndexLoadError."""
    return map_ids(storage.join(stage_shard(folder, shard, [IDS_FILE]), IDS_FILE))


def append(
    folder: str,
    shards: Sequence[Shard],
    *,
    source_rows: int = 0,
    rejected: int = 0,
    base: Manifest | None = None,
    source: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return a version with further shards, which `write_shard` has made from this index's template.

    Args:
        source_rows, rejected: references that went in, and those that were rejected.
        source: how the further references were read (`Manifest.sources`).
        base: the version whose ids the new ones were compared with; takedowns and compactions since do no harm.

    Raises:
        InputError: a shard's name is taken.
        RunError: others have appended since `base`, or change the index so fast that no turn was had.
    """

    tried = False

    def change(manifest: Manifest) -> Manifest:
        nonlocal tried
        if tried and all(shard in manifest.shards for shard in shards):
            return manifest  # our own version, and others that followed it before we looked
        tried = True
        if base is not None and base.source_rows != manifest.source_rows:
            raise RunError("was appended to by somebody else meanwhile", where=folder, hint="run it again")
        taken = {shard.name for shard in manifest.shards} & {shard.name for shard in shards}
        if taken:
            raise InputError(f"shard {min(taken)} is there already", where=folder)
        return dataclasses.replace(
            manifest,
            shards=(*manifest.shards, *shards),
            source_rows=manifest.source_rows + source_rows,
            rejected=manifest.rejected + rejected,
            sources=(*manifest.sources, *([] if source is None else [source])),
        )

    return _changed(folder, change)


def remove(folder: str, ids: Sequence[str]) -> Manifest:
    """Return a version in whose answers these references do not occur. Ids that are removed already are no mistake.

    Raises:
        InputError: an id that the index does not hold.
        IntegrityError: the index is damaged.
        RunError: as `append`.
    """
    return _changed(folder, lambda manifest: _without(folder, manifest, ids))


def _without(folder: str, manifest: Manifest, ids: Sequence[str]) -> Manifest:
    known = _removed(folder, manifest)
    gone = set(known["reference_id"].to_pylist())
    wanted = [name for name in dict.fromkeys(ids) if name not in gone]
    found = []
    for shard in manifest.shards if wanted else ():
        named = read_ids(folder, shard)
        rows = np.flatnonzero(pc.is_in(named, value_set=pa.array(wanted, pa.large_string())).to_numpy(False))
        found += [{"reference_id": named[row].as_py(), "shard": shard.name, "row": row} for row in rows.tolist()]
    missing = sorted(set(wanted) - {entry["reference_id"] for entry in found})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"no reference {missing[0]!r}{more} in the index", where=folder, hint="nothing was removed")
    if not found:
        return manifest
    return _with_removed(folder, manifest, pa.concat_tables([known, pa.Table.from_pylist(found, schema=REMOVED)]))


def compact(folder: str) -> Manifest:
    """Return a version without removed references: the shards that hold some are written again. Raises as `remove`."""
    made: dict[str, Shard] = {}  # by name, which says what is in it: what was written before a lost race is used again
    return _changed(folder, lambda manifest: _compacted(folder, manifest, made))


def _compacted(folder: str, manifest: Manifest, made: dict[str, Shard]) -> Manifest:
    if not manifest.removed_count:
        return manifest
    template = partial(read_template, stage_template(folder, manifest), factory=manifest.factory)
    shards = []
    for shard, gone in zip(manifest.shards, removed_rows(folder, manifest), strict=True):
        if not len(gone):
            shards.append(shard)
        elif len(gone) < shard.count:
            mark = hashlib.sha256(f"{shard.name}\0{gone.tolist()}".encode()).hexdigest()[:12]
            name = f"{shard.name.partition('-')[0]}-{mark}"
            if name not in made:
                keep = np.ones(shard.count, bool)
                keep[gone] = False
                old = OpenShard(stage_shard(folder, shard), manifest, shard, 0, manifest.nprobe, gone)
                vectors = {region: partial(_kept_vectors, old, region, keep) for region in manifest.regions}
                rows = _kept_references(storage.join(old.place, REFERENCES_FILE), keep)
                made[name] = write_shard(folder, name, rows, vectors, template, manifest.factory)
            shards.append(made[name])
    if not shards:
        raise InputError("every reference was removed; nothing would be left", where=folder)
    empty: dict[str, Any] = {"removed_file": None, "removed_entry": None, "removed_count": 0}
    return dataclasses.replace(manifest, shards=tuple(shards), **empty)


def prune(folder: str, keep: int = 1) -> list[str]:
    """Remove versions but the last `keep`, and the files that no other one names; gives the paths removed.

    Files that never were in any version stay for ORPHAN_SECONDS: a change may be about to name them.
    """
    current = Manifest.load(folder)
    kept: list[int] = []
    dropped: list[int] = []
    for version in range(1, current.version + 1):
        if storage.exists(version_file(folder, version)):
            (kept if version == current.version or version > current.version - keep else dropped).append(version)
    used = {name for version in kept for name, _ in Manifest.load(folder, version).files()}
    stale = {name for version in dropped for name, _ in Manifest.load(folder, version).files()} - used
    # Manifests go first: a version whose files are going must not be found.
    paths = [*(version_file(folder, version) for version in dropped), *(storage.join(folder, n) for n in sorted(stale))]
    for path in paths:
        storage.remove_tree(path)
    orphans = _orphans(folder)
    for path in orphans:
        storage.remove_tree(path)
    return [*paths, *orphans]


def _orphans(folder: str) -> list[str]:
    """Old files of shards and takedowns that no version names; none while something is being added."""
    if storage.exists(folder.rstrip("/") + BUILD_ENDING):
        return []  # its shards lie in their places, for days perhaps, before a version names them
    old = {
        f"{place}/{name}"
        for place in ("shards", "removed")
        if storage.is_dir(storage.join(folder, place))
        for name, seconds in storage.ages(storage.join(folder, place)).items()
        if seconds >= ORPHAN_SECONDS
    }
    # The versions after the files: one that was made meanwhile keeps its own.
    named = {name for version in versions(folder).numbers() for name, _ in Manifest.load(folder, version).files()}
    return [storage.join(folder, name) for name in sorted(old - named)]


def _changed(folder: str, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Return the next version, made by `change` from the one that counts; made again where another came first.

    Args:
        change: gives its argument where there is nothing to do.
    """
    for attempt in range(ATTEMPTS):
        manifest = Manifest.load(folder)
        changed = change(manifest)
        if changed is manifest:
            return manifest
        successor = dataclasses.replace(changed, version=manifest.version + 1)
        known = {name for name, _ in manifest.files()}
        for name, _ in successor.files():
            if name not in known and not storage.exists(storage.join(folder, name)):
                raise RunError(f"{name} was pruned meanwhile; nothing was changed", where=folder, hint="run it again")
        if successor.swap(folder):
            return successor
        time.sleep(random.uniform(0, min(2.0, 0.01 * 2**attempt)))
    raise RunError(
        f"is changed by others so often that {ATTEMPTS} attempts came too late; nothing was changed",
        where=folder,
        hint="run it again when they are done",
    )


def _with_removed(folder: str, manifest: Manifest, removed: pa.Table) -> Manifest:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "removed.parquet"
        pq.write_table(removed, file, compression="zstd")
        entry = describe(str(file))
        # A name of its content: two takedowns at once must not write one file.
        name = f"removed/{manifest.version + 1:06d}.{entry.sha256[:8]}.parquet"
        storage.move_in(file, storage.join(folder, name))
    return dataclasses.replace(manifest, removed_file=name, removed_entry=entry, removed_count=removed.num_rows)


def _removed(folder: str, manifest: Manifest) -> pa.Table:
    if manifest.removed_file is None or manifest.removed_entry is None:
        return REMOVED.empty_table()
    return pq.read_table(stage_file(folder, manifest.removed_file, manifest.removed_entry), schema=REMOVED)


def _kept_references(path: str, keep: np.ndarray) -> Iterator[pa.Table]:
    start = 0
    for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP):
        table = pa.Table.from_batches([batch])
        yield table.filter(pa.array(keep[start : start + table.num_rows]))
        start += table.num_rows


def _kept_vectors(shard: OpenShard, region: str, keep: np.ndarray) -> Vectors:
    return np.ascontiguousarray(shard.vectors(region)[keep])
