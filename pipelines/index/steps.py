"""This module has the steps of a build after the images are encoded; each is a function of one item for any worker.

Each step leaves a record, and does nothing if it finds its record, so a step that died is simply run again. No step
holds more than one shard's vectors of one region, or the training sample of one region.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import Reason
from memscan.index import vectors as faiss_vectors
from memscan.index.change import read_ids, removed_rows
from memscan.index.local_copy import stage_shard, stage_template
from memscan.index.manifest import FileEntry, Manifest
from memscan.index.recall import ShardAnswer, make_queries, query_shard
from memscan.index.shards import OpenShard, read_template, write_shard, write_template
from memscan.io import storage
from memscan.records import REFERENCES
from pipelines.index.building import BuildFolder, Group, vectors_of
from pipelines.run_folder.tables import read_table, write_table

EXISTING = -1  # group of ids that an index holds already
SLICES = 4096  # of the range of hashes
QUERY_CHUNKS = 16
SAMPLE_SEED = 77
REJECTS = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string()),
    ]
)


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """Return 64 bits of each id.

    Two different ids have the same bits once in about 10^19 pairs. Of 5e9 ids, there is a single such pair with a
    chance of one half; its second id is then rejected.
    """
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.uint64)


@dataclass(frozen=True)
class IdsOf:
    """This writes the sorted hashes of the good ids of a group, or of a shard that the index has already."""

    build: BuildFolder

    def __call__(self, at: int) -> int:
        groups = self.build.groups() or []
        if storage.exists(self.path(at)):
            return at
        group = groups[at]
        parts = [np.empty(0, np.uint64)]
        for chunk in group.chunks:
            table = self.build.chunk(chunk, ["reference_id", "reason"])
            parts.append(hash_ids(table.filter(pc.is_null(table["reason"]))["reference_id"].to_pylist()))
        self.write(at, np.sort(np.concatenate(parts)))
        return at

    def existing(self, folder: str, manifest: Manifest, at: int) -> None:
        """Return a call for the shard of an index that is added to.

        Removed ids count too, so that they do not come back.
        """
        self.write(EXISTING - at, np.sort(hash_ids(read_ids(folder, manifest.shards[at]).to_pylist())))

    def path(self, at: int) -> str:
        return self.build.path("ids", f"{at}.u64")

    def write(self, at: int, hashes: np.ndarray) -> None:
        """Write sorted hashes, after a table that says where each 4096th of their range begins."""
        bounds = np.arange(1, SLICES, dtype=np.uint64) * np.uint64(2**64 // SLICES)
        table = np.concatenate([[0], np.searchsorted(hashes, bounds), [len(hashes)]]).astype(np.int64)
        storage.write_atomic(self.path(at), table.tobytes() + hashes.tobytes())

    def read(self, at: int, first: int, last: int) -> np.ndarray:
        """Return the hashes of the slices [first, last)."""
        head = 8 * (SLICES + 1)
        with storage.open_input(self.path(at)) as file:
            table = np.frombuffer(file.read(head), np.int64)
            file.seek(head + 8 * int(table[first]))
            return np.frombuffer(file.read(8 * int(table[last] - table[first])), np.uint64)


@dataclass(frozen=True)
class Repeats:
    """This finds ids that occur twice, one range of hashes at a time.

    Args:
        groups: numbers of the groups, `EXISTING` and below among them.
        ranges: how many ranges there are.
    """

    build: BuildFolder
    groups: tuple[int, ...]
    ranges: int

    def __call__(self, number: int) -> int:
        name = f"{number}.parquet"
        if storage.exists(self.build.path("repeats", name)):
            return number
        first, last = number * SLICES // self.ranges, (number + 1) * SLICES // self.ranges
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for group in self.groups:
            hashes.append(IdsOf(self.build).read(group, first, last))
            owners.append(np.full(len(hashes[-1]), max(group, EXISTING)))
        joined, owner = np.concatenate(hashes), np.concatenate(owners)
        order = np.lexsort((owner, joined))
        joined, owner = joined[order], owner[order]
        same = joined[1:] == joined[:-1]
        # The first of each hash, where another one follows.
        twice = np.flatnonzero(np.concatenate([same, [False]]) & ~np.concatenate([[False], same]))[: len(joined)]
        table = pa.table({"hash": pa.array(joined[twice], pa.uint64()), "group": pa.array(owner[twice], pa.int64())})
        write_table(self.build.path("repeats", name), table)
        return number


@dataclass(frozen=True)
class Train:
    """This trains the template of one region on a sample of chunks."""

    build: BuildFolder
    index: str
    factory: str
    count: int

    def __call__(self, region: str) -> str:
        if self.build.read_json(f"template-{region}.json") is None:
            sample_ND = np.concatenate([self._vectors(chunk, region) for chunk in self._sample()])
            sample_ND = sample_ND[faiss_vectors.training_rows(len(sample_ND), self.factory)]
            template = faiss_vectors.train(sample_ND, self.factory, self.count)
            entries = write_template(self.index, {region: template})
            self.build.write_json({name: asdict(entry) for name, entry in entries.items()}, f"template-{region}.json")
        return region

    def entries(self, regions: Sequence[str]) -> dict[str, FileEntry]:
        """Return the file entries of all regions."""
        found = [self.build.read_json(f"template-{region}.json") for region in regions]
        return {name: FileEntry(**entry) for files in found for name, entry in files.items()}

    def queries(self, regions: Sequence[str]) -> None:
        """Write queries of all regions, out of chunks from all over the source."""
        if self.build.load_arrays("probes.npz") is None:
            chunks = self._chunks()
            chosen = [chunks[at] for at in np.unique(np.linspace(0, len(chunks) - 1, QUERY_CHUNKS).astype(int))]
            self.build.save_arrays(
                {r: make_queries(np.concatenate([self._vectors(chunk, r) for chunk in chosen])) for r in regions},
                "probes.npz",
            )

    def _chunks(self) -> list[tuple[int, int, int]]:
        return [chunk for group in self.build.groups() or [] for chunk in group.chunks if chunk[2]]

    def _sample(self) -> list[tuple[int, int, int]]:
        """Chunks in random order until there are vectors enough, then in their own order."""
        chunks = self._chunks()
        taken, held = [], 0
        for at in np.random.default_rng(SAMPLE_SEED).permutation(len(chunks)):
            taken.append(chunks[at])
            held += chunks[at][2]
            if held >= faiss_vectors.training_count(self.factory):
                break
        return sorted(taken)

    def _vectors(self, chunk: tuple[int, int, int], region: str) -> np.ndarray:
        table = self.build.chunk(chunk, [region, "reason"])
        return vectors_of(table.filter(pc.is_null(table["reason"])), region)


@dataclass(frozen=True)
class MakeShard:
    """This makes the shard of one group, and writes the group's rejects.

    Args:
        manifest: of the index so far: its template, type and regions.
    """

    build: BuildFolder
    index: str
    manifest: Manifest

    def __call__(self, at: int) -> int:
        groups = self.build.groups() or []
        group = groups[at]
        if self.build.shard(group.name) is None:
            keep = self._keep(at, group)
            rejected = self._rejects(group, keep)
            if any(mask.any() for mask in keep.values()):
                shard = write_shard(
                    self.index,
                    group.name,
                    self._references(group, keep),
                    {region: partial(self._vectors, group, keep, region) for region in self.manifest.regions},
                    partial(read_template, stage_template(self.index, self.manifest), factory=self.manifest.factory),
                    self.manifest.factory,
                )
                self.build.write_shard(shard, rejected)
            else:
                self.build.write_json({"shard": None, "rejected": rejected}, "shards", f"{group.name}.json")
        return at

    def _keep(self, at: int, group: Group) -> dict[int, np.ndarray]:
        """By chunk, which rows are references: neither rejected nor repeated."""
        folder = self.build.path("repeats")
        repeats = pa.concat_tables([read_table(file) for file in storage.list_files(folder, ".parquet")])
        owner = dict(zip(repeats["hash"].to_pylist(), repeats["group"].to_pylist(), strict=True))
        keep = {}
        seen: set[int] = set()
        for chunk in group.chunks:
            table = self.build.chunk(chunk, ["reference_id", "reason"])
            good = pc.is_null(table["reason"]).to_numpy(zero_copy_only=False).copy()
            if owner:
                for row, name in enumerate(hash_ids(table["reference_id"].to_pylist()).tolist()):
                    if good[row] and name in owner:
                        good[row] = owner[name] == at and name not in seen
                        seen.add(name)
            keep[chunk[0]] = good
        return keep

    def _rejects(self, group: Group, keep: Mapping[int, np.ndarray]) -> int:
        tables = []
        for chunk in group.chunks:
            table = self.build.chunk(chunk, REJECTS.names).filter(pa.array(~keep[chunk[0]]))
            repeated = pc.is_null(table["reason"])
            reason = pc.if_else(repeated, Reason.ID_REPEATED.value, table["reason"])
            message = pc.if_else(repeated, "another reference has this id", table["message"])
            for name, column in (("reason", reason), ("message", message)):
                table = table.set_column(REJECTS.get_field_index(name), name, column)
            tables.append(table.cast(REJECTS))
        rejects = pa.concat_tables(tables)
        write_table(self.build.path("rejects", f"{group.name}.parquet"), rejects)
        return int(rejects.num_rows)

    def _references(self, group: Group, keep: Mapping[int, np.ndarray]) -> Iterator[pa.Table]:
        for chunk in group.chunks:
            yield self.build.chunk(chunk, REFERENCES.names).filter(pa.array(keep[chunk[0]]))

    def _vectors(self, group: Group, keep: Mapping[int, np.ndarray], region: str) -> np.ndarray:
        parts = []
        for chunk in group.chunks:
            if keep[chunk[0]].any():
                parts.append(vectors_of(self.build.chunk(chunk, [region]).filter(pa.array(keep[chunk[0]])), region))
        return np.concatenate(parts)


@dataclass(frozen=True)
class MeasureRecall:
    """This asks one shard the queries, exactly and through its index, and writes both answers."""

    build: BuildFolder
    index: str
    manifest: Manifest

    def __call__(self, at: int) -> int:
        name = f"{self.manifest.shards[at].name}.npz"
        if not storage.exists(self.build.path("recall", name)):
            queries = self.build.load_arrays("probes.npz") or {}
            shard = open_shard(self.index, self.manifest, at)
            arrays: dict[str, Any] = {}
            for region in self.manifest.regions:
                answer = query_shard(shard, region, queries[region])
                for part, array in zip(_PARTS, (*answer.exact, *answer.found), strict=True):
                    arrays[f"{region}.{part}"] = array
            self.build.save_arrays(arrays, "recall", name)
        return at

    def answer(self, at: int) -> dict[str, ShardAnswer]:
        """Return what a shard answered, by region."""
        arrays = self.build.load_arrays("recall", f"{self.manifest.shards[at].name}.npz") or {}
        found = {}
        for region in self.manifest.regions:
            rows, similarities, *rest = (arrays[f"{region}.{part}"] for part in _PARTS)
            found[region] = ShardAnswer((rows, similarities), (rest[0], rest[1], rest[2]))
        return found


_PARTS = ("exact_rows", "exact", "rows", "given", "ranked")


def open_shard(folder: str, manifest: Manifest, at: int) -> OpenShard:
    """Open one shard, which is on this machine and verified."""
    place = stage_shard(folder, manifest.shards[at])
    removed = removed_rows(folder, manifest)[at]
    return OpenShard(place, manifest, manifest.shards[at], manifest.starts()[at], manifest.nprobe, removed)
