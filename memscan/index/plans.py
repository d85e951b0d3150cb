"""Two ways to reach the shards from one process: all of them open at once, or one after another.

*Resident* maps every shard into memory; what is never searched is never read. *Shard-major* opens one shard at a time
and asks it everything, for many queries on a machine with little memory, such as stored vectors against a new index.
The third way, one actor a shard, needs Ray and is in `pipelines/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memscan.index.manifest import Manifest
from memscan.index.references import Reference, ShardedReferences
from memscan.index.search import Answer
from memscan.index.shards import OpenShard
from memscan.index.vectors import Rows, Vectors


class Resident:
    """All shards open."""

    def __init__(self, shards: Sequence[OpenShard]) -> None:
        self.shards = shards
        self.references = ShardedReferences([shard.references for shard in shards])

    def candidates(self, region: str, queries_ND: Vectors, k: int) -> list[list[Answer]]:
        """See `Plan`."""
        return [shard.candidates(region, queries_ND, k) for shard in self.shards]

    def similarities(self, region: str, rows: Sequence[Rows], queries_ND: Vectors) -> list[Vectors]:
        """See `Plan`."""
        found = [np.empty(len(some), np.float32) for some in rows]
        for shard in self.shards:
            rank(shard, region, rows, queries_ND, found)
        return found

    def ids(self, rows: Rows) -> list[str]:
        """See `Plan`."""
        return [self.references.id_of(row) for row in rows.tolist()]

    def fetch(self, row: int) -> Reference:
        """See `Plan`."""
        return self.references.fetch(row)


class ShardMajor:
    """One shard open at a time. Each call goes through all shards once, so queries should come many at a time."""

    def __init__(self, folder: str, manifest: Manifest, nprobe: int) -> None:
        self._folder, self._manifest, self._nprobe = folder, manifest, nprobe

    def candidates(self, region: str, queries_ND: Vectors, k: int) -> list[list[Answer]]:
        """See `Plan`."""
        return [self._open(at).candidates(region, queries_ND, k) for at in range(len(self._manifest.shards))]

    def similarities(self, region: str, rows: Sequence[Rows], queries_ND: Vectors) -> list[Vectors]:
        """See `Plan`."""
        found = [np.empty(len(some), np.float32) for some in rows]
        for at in range(len(self._manifest.shards)):
            rank(self._open(at), region, rows, queries_ND, found)
        return found

    def ids(self, rows: Rows) -> list[str]:
        """See `Plan`."""
        return [self._of(row).references.id_of(inner) for row, inner in map(self._inner, rows.tolist())]

    def fetch(self, row: int) -> Reference:
        """See `Plan`."""
        shard, inner = self._inner(row)
        return self._of(shard).references.fetch(inner)

    def _open(self, at: int) -> OpenShard:
        return OpenShard.open(self._folder, self._manifest, self._manifest.shards[at], self._nprobe)

    def _of(self, at: int) -> OpenShard:
        if getattr(self, "_last", (None,))[0] != at:
            self._last: tuple[int, OpenShard] = (at, self._open(at))
        return self._last[1]

    def _inner(self, row: int) -> tuple[int, int]:
        starts = np.cumsum([0, *(shard.count for shard in self._manifest.shards)])
        if not 0 <= row < starts[-1]:
            raise IndexError(f"row {row} of {starts[-1]} references")
        at = int(np.searchsorted(starts, row, side="right")) - 1
        return at, row - int(starts[at])


def rank(shard: OpenShard, region: str, rows: Sequence[Rows], queries_ND: Vectors, found: Sequence[Vectors]) -> None:
    """Fill in the exact similarities of those rows that lie in a shard."""
    for query_D, some, similarities in zip(queries_ND, rows, found, strict=True):
        own = (some >= shard.start) & (some < shard.start + len(shard.references))
        if own.any():
            similarities[own] = shard.similarities(region, some[own], query_D)
