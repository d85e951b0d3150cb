"""Changes of an index: each makes a new version out of files that stay and files that are new.

Appended shards are copies of the same template. Removed references (takedowns) stay in their shard but are in no
answer, until the index is compacted: shards that hold some are written anew without them. Files that no kept version
names are removed by `prune`, which must not be run while a census uses an older version.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memscan import storage
from memscan.errors import InputError
from memscan.index import vectors as faiss_vectors
from memscan.index.choice import is_compressed
from memscan.index.manifest import REFERENCES_FILE, Manifest, Shard, describe, exact_file, vector_file, version_file
from memscan.index.references import ROW_GROUP
from memscan.index.shards import read_templates, write_shard
from memscan.index.staging import stage

REMOVED = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # in its shard
    ]
)


def removed_rows(local: str, manifest: Manifest) -> faiss_vectors.Rows:
    """Rows of the whole index that are in no answer, ascending; the folder is local and verified."""
    table = _removed(local, manifest)
    starts = dict(
        zip(
            (shard.name for shard in manifest.shards),
            np.cumsum([0, *(shard.count for shard in manifest.shards)]).tolist(),
            strict=False,
        )
    )
    rows = [starts[shard] + row for shard, row in zip(*(table[n].to_pylist() for n in ("shard", "row")), strict=True)]
    return np.array(sorted(rows), np.int64)


def append(folder: str, shards: Sequence[Shard]) -> Manifest:
    """A version with further shards, which `write_shard` has made from this index's templates.

    Raises:
        InputError: a shard's name is taken.
    """
    manifest = Manifest.load(folder)
    taken = {shard.name for shard in manifest.shards} & {shard.name for shard in shards}
    if taken:
        raise InputError(f"shard {min(taken)} is there already", where=folder)
    return _next(folder, manifest, shards=(*manifest.shards, *shards))


def remove(folder: str, ids: Sequence[str]) -> Manifest:
    """A version in whose answers these references do not occur. Ids that are removed already are no mistake.

    Raises:
        InputError: an id that the index does not hold.
        IntegrityError: the index is damaged.
    """
    manifest = Manifest.load(folder)
    local = stage(folder, manifest)
    known = _removed(local, manifest)
    gone = set(known["reference_id"].to_pylist())
    wanted = dict.fromkeys(name for name in ids if name not in gone)
    found = [
        {"reference_id": name, "shard": shard.name, "row": row}
        for shard in manifest.shards
        for row, name in enumerate(_ids(local, shard))
        if name in wanted
    ]
    missing = [name for name in wanted if name not in {entry["reference_id"] for entry in found}]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"no reference {missing[0]!r}{more} in the index", where=folder, hint="nothing was removed")
    if not found:
        return manifest
    return _with_removed(folder, manifest, pa.concat_tables([known, pa.Table.from_pylist(found, schema=REMOVED)]))


def compact(folder: str) -> Manifest:
    """A version without removed references: the shards that hold some are written anew. Raises as `remove`."""
    manifest = Manifest.load(folder)
    local = stage(folder, manifest)
    removed = _removed(local, manifest).to_pydict()
    if not removed["row"]:
        return manifest
    templates = read_templates(local, manifest)
    shards = []
    for shard in manifest.shards:
        gone = {row for name, row in zip(removed["shard"], removed["row"], strict=True) if name == shard.name}
        if not gone:
            shards.append(shard)
        elif len(gone) < shard.count:
            keep = np.array([row not in gone for row in range(shard.count)])
            vectors = {
                region: partial(_kept_vectors, local, manifest, shard, region, keep) for region in manifest.regions
            }
            name = f"{shard.name.partition('-')[0]}-{manifest.version + 1:06d}"
            rows = _kept_references(local, shard, keep)
            shards.append(write_shard(folder, name, rows, vectors, templates, manifest.factory))
    if not shards:
        raise InputError("every reference was removed; nothing would be left", where=folder)
    empty = {"removed_file": None, "removed_entry": None, "removed_count": 0}
    return _next(folder, manifest, shards=tuple(shards), **empty)


def prune(folder: str, keep: int = 1) -> list[str]:
    """Remove versions but the last `keep`, and the files that only they named; gives the paths removed."""
    current = Manifest.load(folder)
    kept: list[int] = []
    dropped: list[int] = []
    for version in range(1, current.version + 1):
        if storage.exists(version_file(folder, version)):
            (kept if version > current.version - keep else dropped).append(version)
    used = {name for version in kept for name, _ in Manifest.load(folder, version).files()}
    stale = {name for version in dropped for name, _ in Manifest.load(folder, version).files()} - used
    # Manifests go first: a version whose files are going must not be found.
    paths = [*(version_file(folder, version) for version in dropped), *(storage.join(folder, n) for n in sorted(stale))]
    for path in paths:
        storage.remove_tree(path)
    return paths


def _next(folder: str, manifest: Manifest, **changes: object) -> Manifest:
    successor = dataclasses.replace(manifest, version=manifest.version + 1, **changes)  # type: ignore[arg-type]
    successor.save(folder)
    return successor


def _with_removed(folder: str, manifest: Manifest, removed: pa.Table) -> Manifest:
    name = f"removed/{manifest.version + 1:06d}.parquet"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "removed.parquet"
        pq.write_table(removed, file, compression="zstd")
        entry = describe(str(file))
        storage.move_in(file, storage.join(folder, name))
    return _next(folder, manifest, removed_file=name, removed_entry=entry, removed_count=removed.num_rows)


def _removed(local: str, manifest: Manifest) -> pa.Table:
    if manifest.removed_file is None:
        return REMOVED.empty_table()
    return pq.read_table(storage.join(local, manifest.removed_file), schema=REMOVED)


def _ids(local: str, shard: Shard) -> list[str]:
    file = storage.join(local, "shards", shard.name, REFERENCES_FILE)
    found: list[str] = pq.read_table(file, columns=["reference_id"])["reference_id"].to_pylist()
    return found


def _kept_references(local: str, shard: Shard, keep: np.ndarray) -> Iterator[pa.Table]:
    file = pq.ParquetFile(storage.join(local, "shards", shard.name, REFERENCES_FILE))
    start = 0
    for batch in file.iter_batches(ROW_GROUP):
        table = pa.Table.from_batches([batch])
        yield table.filter(pa.array(keep[start : start + table.num_rows]))
        start += table.num_rows


def _kept_vectors(local: str, manifest: Manifest, shard: Shard, region: str, keep: np.ndarray) -> faiss_vectors.Vectors:
    """Vectors of a shard as they were given, or, of compressed indexes, to half precision."""
    place = storage.join(local, "shards", shard.name)
    if is_compressed(manifest.factory):
        halves = np.load(storage.join(place, exact_file(region)), mmap_mode="r")[keep].astype(np.float32)
        return np.asarray(halves / np.linalg.norm(halves, axis=1, keepdims=True), dtype=np.float32)
    index = faiss_vectors.read(storage.join(place, vector_file(region)), manifest.factory, mapped=False)
    return np.ascontiguousarray(faiss_vectors.stored(index)[keep])
