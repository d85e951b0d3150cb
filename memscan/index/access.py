"""This module reaches the shards from one process in two ways: all of them open at once, or one after another.

*Resident* maps every shard into memory; what is never searched is never read. *Shard-major* opens one shard at a time
and sends all queries to it. This suits many queries on a machine with little memory or disk, for example stored vectors
against a new index. The third way, *scatter*, has one actor per shard, needs Ray, and is in
`pipelines/scan/scatter.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from memscan.index.local_copy import passing_shard
from memscan.index.manifest import IDS_FILE, REFERENCES_FILE, Manifest, exact_file, vector_file
from memscan.index.references import Reference, ReferenceStore
from memscan.index.shards import OpenShard
from memscan.index.vectors import Answer, Rows, Vectors, load_faiss

# Of each, the table of row groups is in memory: some megabytes per shard.
OPEN_REFERENCES = 16
# Starting threads costs as much as reading some hundred vectors.
READ_BY_ONE_THREAD = 2048
_NONE = np.empty(0, np.int64)


class Resident:
    """This keeps all shards open."""

    def __init__(self, shards: Sequence[OpenShard]) -> None:
        self._shards = shards
        self._starts = np.array([shard.start for shard in shards])
        self._references: OrderedDict[int, ReferenceStore] = OrderedDict()

    def candidates(self, queries: Mapping[str, Vectors], k: int) -> dict[str, list[Answer]]:
        """Search as `ShardAccess.candidates` says."""
        found = {}
        for region, queries_ND in queries.items():
            # Once for all shards: with four of them this is half of the work of a search.
            lists = self._shards[0].lists(region, queries_ND)
            found[region] = [shard.candidates(region, queries_ND, k, lists) for shard in self._shards]
        return found

    def similarities(self, rows: Mapping[str, Rows], queries: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """Compare as `ShardAccess.similarities` says."""
        return {region: best(self._ranked(region, rows_NK, queries[region])) for region, rows_NK in rows.items()}

    def _ranked(self, region: str, rows_NK: Rows, queries_ND: Vectors) -> list[Vectors]:
        """By shard, with as many threads as FAISS uses where there is enough to read: it is waiting and copying."""

        def rank(shard: OpenShard) -> Vectors:
            return shard.rank(region, rows_NK, queries_ND)

        threads = min(len(self._shards), load_faiss().omp_get_max_threads())
        if threads == 1 or rows_NK.size < READ_BY_ONE_THREAD:
            return [rank(shard) for shard in self._shards]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(rank, self._shards))

    def ids(self, rows: Rows) -> list[str]:
        """Return ids as `ShardAccess.ids` says."""
        return [self._shards[at].ids[inner].as_py() for at, inner in (place(self._starts, row) for row in rows)]

    def fetch(self, row: int) -> Reference:
        """Fetch as `ShardAccess.fetch` says."""
        at, inner = place(self._starts, row)
        if at not in self._references:
            self._references[at] = self._shards[at].open_references()
            if len(self._references) > OPEN_REFERENCES:
                self._references.popitem(last=False)
        self._references.move_to_end(at)
        return self._references[at].fetch(inner)


class ShardMajor:
    """This keeps one shard open at a time.

    Of a shard on s3:// it holds only the files that are needed, and only while they are needed.

    A search goes through all shards once, twice where the index is compressed, so queries should come by the thousand.
    """

    def __init__(self, folder: str, manifest: Manifest, nprobe: int, removed: Sequence[Rows]) -> None:
        self._folder, self._manifest, self._nprobe, self._removed = folder, manifest, nprobe, removed
        self._starts = np.array(manifest.starts()[:-1])

    def candidates(self, queries: Mapping[str, Vectors], k: int) -> dict[str, list[Answer]]:
        """Search as `ShardAccess.candidates` says."""
        found: dict[str, list[Answer]] = {region: [] for region in queries}
        for at in range(len(self._starts)):
            with self._at(at, [vector_file(region) for region in queries]) as shard:
                for region, queries_ND in queries.items():
                    found[region].append(shard.candidates(region, queries_ND, k))
        return found

    def similarities(self, rows: Mapping[str, Rows], queries: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """Compare as `ShardAccess.similarities` says."""
        found: dict[str, list[Vectors]] = {region: [] for region in rows}
        for at in range(len(self._starts)):
            with self._at(at, [exact_file(region) for region in rows]) as shard:
                for region, rows_NK in rows.items():
                    found[region].append(shard.rank(region, rows_NK, queries[region]))
        return {region: best(parts) for region, parts in found.items()}

    def ids(self, rows: Rows) -> list[str]:
        """Return ids as `ShardAccess.ids` says."""
        named: dict[int, str] = {}
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for at in np.unique(shards).tolist():
            with self._at(at, [IDS_FILE]) as shard:
                named |= {row: shard.ids[row - shard.start].as_py() for row in rows[shards == at].tolist()}
        return [named[row] for row in rows.tolist()]

    def fetch(self, row: int) -> Reference:
        """Fetch as `ShardAccess.fetch` says."""
        at, inner = place(self._starts, row)
        with self._at(at, [REFERENCES_FILE]) as shard:
            return shard.open_references().fetch(inner)

    @contextmanager
    def _at(self, at: int, names: Collection[str]) -> Iterator[OpenShard]:
        shard = self._manifest.shards[at]
        with passing_shard(self._folder, shard, names) as local:
            start, removed = int(self._starts[at]), self._removed[at]
            yield OpenShard(local, self._manifest, shard, start, self._nprobe, removed)


def place(starts: Rows, row: int) -> tuple[int, int]:
    """Return the number of the shard that holds a row, and the row in it."""
    at = int(np.searchsorted(starts, row, side="right")) - 1
    return at, int(row - starts[at])


def best(parts: Sequence[Vectors]) -> Vectors:
    """Return similarities (N, K) from the shards, each of which knows its own rows and gives -inf for the others."""
    found: Vectors = np.max(np.stack(parts), axis=0)
    return found
