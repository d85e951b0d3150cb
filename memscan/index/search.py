"""This module combines the answers of shards into the answer of the index, in the same way for every access to shards.

Each shard gives its nearest rows, the union is ordered by similarity and row, and answers of a compressed index are
ranked again by half precision vectors. An access (resident, shard-major, scatter) only says how a question reaches a
shard, so all of them give the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memscan.index.choice import is_compressed
from memscan.index.manifest import Manifest
from memscan.index.references import Reference
from memscan.index.vectors import Answer, Rows, Vectors, ordered

# How many candidates of a compressed index are ranked again: at least so many, and so many for each one asked for. Of a
# million near-duplicates, 10 for the first neighbour gave the same R@1 as 100 (docs/benchmarks.md).
RERANKED_AT_LEAST = 10
RERANKED_EACH = 10


class ShardAccess(Protocol):
    """This is a way to reach the shards of one version of an index. Rows are rows of the whole index."""

    def candidates(self, queries: Mapping[str, Vectors], k: int) -> dict[str, list[Answer]]:
        """Return, by region and shard, the `k` nearest rows of each query; see `vectors.search`.

        Removed rows are left out.
        """

    def similarities(self, rows: Mapping[str, Rows], queries: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """Return, by region, the exact similarities of rows (N, K) to their query; -inf for the row -1."""

    def ids(self, rows: Rows) -> list[str]:
        """Return ids of rows."""

    def fetch(self, row: int) -> Reference:
        """Return a reference with its image; raises RowReject as `ReferenceStore.fetch`."""


@dataclass(frozen=True)
class Hit:
    """A hit is a candidate: a reference near the query in at least one region.

    Attributes:
        row: in the index.
        found_by: the regions whose search returned it, joined by "+", in the order whole, foreground, background.
        similarity: cosine, the best of those regions.
        similarities: cosine by region, for the regions in `found_by` only.
    """

    row: int
    reference_id: str
    found_by: str
    similarity: float
    similarities: Mapping[str, float]


def nearest_whole(hits: Sequence[Hit]) -> float:
    """Return the cosine of the whole image to its nearest reference; -1 if no hit was found by the whole image."""
    return max((hit.similarities["whole"] for hit in hits if "whole" in hit.similarities), default=-1.0)


def wanted(manifest: Manifest, k: int) -> int:
    """Return how many candidates each shard must return, so that `k` can be answered."""
    return max(RERANKED_AT_LEAST, RERANKED_EACH * k) if is_compressed(manifest.factory) else k


def nearest(access: ShardAccess, manifest: Manifest, queries: Mapping[str, Vectors], k: int) -> dict[str, Answer]:
    """Return, by region, the `k` nearest references of each query, most similar first, and equal ones by row."""
    merged = {
        region: union(parts, wanted(manifest, k))
        for region, parts in access.candidates(queries, wanted(manifest, k)).items()
    }
    if is_compressed(manifest.factory):
        exact = access.similarities({region: rows for region, (rows, _) in merged.items()}, queries)
        merged = {region: ordered(rows, exact[region]) for region, (rows, _) in merged.items()}
    return {region: (rows[:, :k], similarities[:, :k]) for region, (rows, similarities) in merged.items()}


def union(parts: Sequence[Answer], k: int) -> Answer:
    """Return the `k` nearest of several shards."""
    if len(parts) == 1:
        rows, similarities = parts[0]
        return rows[:, :k], similarities[:, :k]
    rows = np.concatenate([rows for rows, _ in parts], axis=1)
    similarities = np.concatenate([similarities for _, similarities in parts], axis=1)
    rows, similarities = ordered(rows, similarities)
    return rows[:, :k], similarities[:, :k]


def hits_of(access: ShardAccess, answers: Mapping[str, Answer]) -> list[list[Hit]]:
    """Return, by query, the union of the answers by region, most similar first, and equal ones by row."""
    count = len(next(iter(answers.values()))[0])
    found: list[list[tuple[int, dict[str, float]]]] = []
    for query in range(count):
        by_row: dict[int, dict[str, float]] = {}
        for region, (rows, similarities) in answers.items():
            for row, similarity in zip(rows[query].tolist(), similarities[query].tolist(), strict=True):
                if row >= 0:
                    by_row.setdefault(row, {})[region] = similarity
        best = np.array([max(regions.values()) for regions in by_row.values()], np.float32)
        order, _ = ordered(np.array(list(by_row), np.int64)[None], best[None])
        found.append([(row, by_row[row]) for row in order[0].tolist()])
    rows = np.unique(np.array([row for hits in found for row, _ in hits], np.int64))
    names = dict(zip(rows.tolist(), access.ids(rows), strict=True))
    return [
        [Hit(row, names[row], "+".join(regions), max(regions.values()), regions) for row, regions in hits]
        for hits in found
    ]
