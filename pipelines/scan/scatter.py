"""This module spreads the shards of an index over the nodes, with one actor per shard (scatter and gather).

It is for an index that is larger than a node's disk. Each actor copies, verifies and maps only its own shard, on the
node on which Ray places it. A query goes to all shards at once, and the results are merged as in the other ways of
access, so the answer is the same. If a node is lost, its shard is copied again elsewhere and queried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from memscan.errors import RowReject
from memscan.index.access import best, place
from memscan.index.change import removed_rows
from memscan.index.local_copy import stage_shard
from memscan.index.manifest import Manifest
from memscan.index.references import Reference, ReferenceStore
from memscan.index.shards import OpenShard
from memscan.index.store import ReferenceIndex, check_embedder
from memscan.index.vectors import Answer, Rows, Vectors
from memscan.models.specification import ModelSpec

# Without a limit: a shard is only read, so every call can be made again, and no census can go on without it.
_FOR_EVER = -1


class ShardServer:
    """This is one shard, for the process it runs in.

    It is opened by the first call and not by the constructor, whose errors Ray would not pass on as they are.
    """

    def __init__(self, folder: str, held: tuple[Manifest, Sequence[Rows]], at: int, nprobe: int | None) -> None:
        self._folder, self._at, (self._manifest, removed) = folder, at, held
        self._removed = removed[at]
        self._nprobe = self._manifest.nprobe if nprobe is None else nprobe
        self._shard: OpenShard | None = None
        self._references: ReferenceStore | None = None

    def load(self) -> OpenShard:
        """Stage, verify and open it. Raises IntegrityError, IndexLoadError, MemscanError."""
        if self._shard is None:
            shard = self._manifest.shards[self._at]
            start = self._manifest.starts()[self._at]
            local = stage_shard(self._folder, shard)
            opened = OpenShard(local, self._manifest, shard, start, self._nprobe, self._removed)
            opened.load()
            self._shard = opened
        return self._shard

    def ready(self) -> int:
        """Load it; gives the number of its references."""
        return len(self.load())

    def candidates(self, queries: Mapping[str, Vectors], k: int) -> dict[str, Answer]:
        """Search this shard as `memscan.index.search.ShardAccess` says."""
        return {region: self.load().candidates(region, queries_ND, k) for region, queries_ND in queries.items()}

    def similarities(self, rows: Mapping[str, Rows], queries: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """Compare as `memscan.index.search.ShardAccess` says; -inf for the rows of other shards."""
        return {region: self.load().rank(region, rows_NK, queries[region]) for region, rows_NK in rows.items()}

    def ids(self, rows: Rows) -> list[str]:
        """Return the ids of rows, which are counted from 0 in the shard."""
        return [self.load().ids[row].as_py() for row in rows.tolist()]

    def fetch(self, row: int) -> Reference | RowReject:
        """Return a reference, or why there is none.

        The reason is a value, because Ray would wrap an exception in one of its own.
        """
        if self._references is None:
            self._references = self.load().open_references()
        try:
            return self._references.fetch(row)
        except RowReject as reject:
            return reject


class Scatter:
    """This reaches all shards, each in an actor (see `memscan.index.search.ShardAccess`). It can be pickled.

    Args:
        shards: handles of actors of `ShardServer`, in the order of the manifest.
    """

    def __init__(self, manifest: Manifest, shards: Sequence[Any]) -> None:
        self._shards = tuple(shards)
        self._starts = np.array(manifest.starts()[:-1])

    def candidates(self, queries: Mapping[str, Vectors], k: int) -> dict[str, list[Answer]]:
        """Search as `ShardAccess.candidates` says."""
        asked = ray.put(dict(queries))  # once, however many shards there are
        answers = ray.get([shard.candidates.remote(asked, k) for shard in self._shards])
        return {region: [answer[region] for answer in answers] for region in queries}

    def similarities(self, rows: Mapping[str, Rows], queries: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """Compare as `ShardAccess.similarities` says; only shards that hold some of the rows are asked."""
        held = {self._at(row) for rows_NK in rows.values() for row in np.unique(rows_NK[rows_NK >= 0]).tolist()}
        if not held:
            return {region: np.full(rows_NK.shape, -np.inf, np.float32) for region, rows_NK in rows.items()}
        wanted, asked = ray.put(dict(rows)), ray.put(dict(queries))
        answers = ray.get([self._shards[at].similarities.remote(wanted, asked) for at in sorted(held)])
        return {region: best([answer[region] for answer in answers]) for region in rows}

    def ids(self, rows: Rows) -> list[str]:
        """Return ids as `ShardAccess.ids` says."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        numbers = np.unique(shards).tolist()
        calls = [self._shards[at].ids.remote(rows[shards == at] - self._starts[at]) for at in numbers]
        named = {
            row: name
            for at, names in zip(numbers, ray.get(calls), strict=True)
            for row, name in zip(rows[shards == at].tolist(), names, strict=True)
        }
        return [named[row] for row in rows.tolist()]

    def fetch(self, row: int) -> Reference:
        """Fetch as `ShardAccess.fetch` says."""
        at, inner = place(self._starts, row)
        found = ray.get(self._shards[at].fetch.remote(inner))
        if isinstance(found, RowReject):
            raise found
        reference: Reference = found
        return reference

    def _at(self, row: int) -> int:
        return place(self._starts, row)[0]


def open_scattered(
    folder: str, embedder_spec: ModelSpec | None, shards: Sequence[Any], version: int | None = None
) -> ReferenceIndex:
    """Open an index whose shards are in actors, which have verified them.

    Raises IndexLoadError if it is of another embedder.
    """
    manifest = Manifest.load(folder, version)
    if embedder_spec is not None:
        check_embedder(folder, manifest, embedder_spec)
    return ReferenceIndex(folder, manifest, Scatter(manifest, shards))


@contextmanager
def shard_actors(folder: str, version: int | None = None, nprobe: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Run one actor per shard of a version of an index inside the block, all of them open; needs a running Ray.

    Raises:
        IndexLoadError, IntegrityError, MemscanError: a shard cannot be opened where it was placed.
    """
    manifest = Manifest.load(folder, version)
    held = ray.put((manifest, removed_rows(folder, manifest)))
    # No CPU of Ray's: a search takes milliseconds beside the seconds of a sampler, and an actor that waited for a slot
    # which the samplers hold would stop the census.
    settings = {"num_cpus": 0, "scheduling_strategy": "SPREAD", "max_restarts": _FOR_EVER}
    actor = ray.remote(max_task_retries=_FOR_EVER, **settings)(ShardServer)
    shards = tuple(actor.remote(folder, held, at, nprobe) for at in range(len(manifest.shards)))
    try:
        ray.get([shard.ready.remote() for shard in shards])
        yield shards
    finally:
        for shard in shards:
            ray.kill(shard)
