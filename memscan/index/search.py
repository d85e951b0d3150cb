"""From the answers of shards to the answer of the index: the same for every way of reaching the shards.

Each shard gives its nearest rows, the union is ordered by similarity and row, removed rows are left out, and answers of
a compressed index are ranked again by half precision vectors. A plan (resident, shard-major, scatter) only says how a
question reaches a shard, so all plans give one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memscan.index.choice import is_compressed
from memscan.index.manifest import Manifest
from memscan.index.references import Reference
from memscan.index.vectors import Rows, Vectors, ordered

Answer = tuple[Rows, Vectors]
# How many candidates of a compressed index are ranked again: at least so many, and so many for each one asked for.
# Of a million near-duplicates 50 for the first neighbour gave R@1 .999 (docs/benchmarks.md).
RERANKED_AT_LEAST = 50
RERANKED_EACH = 10


class Plan(Protocol):
    """A way to reach the shards of one version of an index. Rows are of the whole index."""

    def candidates(self, region: str, queries_ND: Vectors, k: int) -> list[list[Answer]]:
        """By shard and query, the `k` nearest rows with their similarities, approximate where compressed."""

    def similarities(self, region: str, rows: Sequence[Rows], queries_ND: Vectors) -> list[Vectors]:
        """By query, the exact similarities of the given rows."""

    def ids(self, rows: Rows) -> list[str]:
        """Ids of rows."""

    def fetch(self, row: int) -> Reference:
        """A reference with its image; raises RowReject as `ReferenceStore.fetch`."""


@dataclass(frozen=True)
class Hit:
    """A candidate: a reference near the query in at least one region.

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
    """Cosine of the whole image to its nearest reference; -1 where no hit was found by the whole image."""
    return max((hit.similarities["whole"] for hit in hits if "whole" in hit.similarities), default=-1.0)


def search_region(
    plan: Plan, manifest: Manifest, removed: Rows, region: str, queries_ND: Vectors, k: int
) -> list[Answer]:
    """The `k` nearest references of each query in one region, most similar first, equal ones by row.

    Args:
        removed: rows that are in no answer, ascending.
    """
    compressed = is_compressed(manifest.factory)
    wanted = max(RERANKED_AT_LEAST, RERANKED_EACH * k) if compressed else k
    by_shard = plan.candidates(region, queries_ND, wanted + len(removed))
    answers = [_union([shard[query] for shard in by_shard], removed) for query in range(len(queries_ND))]
    if not compressed:
        return [(rows[:k], similarities[:k]) for rows, similarities in answers]
    rows = [rows[:wanted] for rows, _ in answers]
    exact = plan.similarities(region, rows, queries_ND)
    ranked = [ordered(some, similarities) for some, similarities in zip(rows, exact, strict=True)]
    return [(some[:k], similarities[:k]) for some, similarities in ranked]


def hits_of(plan: Plan, answers: Mapping[str, Answer]) -> list[Hit]:
    """The union of one query's answers by region, most similar first, equal ones by row."""
    by_row: dict[int, dict[str, float]] = {}
    for region, (rows, similarities) in answers.items():
        for row, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
            by_row.setdefault(row, {})[region] = similarity
    found = np.array(list(by_row), np.int64)
    best = np.array([max(regions.values()) for regions in by_row.values()], np.float32)
    order, _ = ordered(found, best)
    names = plan.ids(order)
    return [
        Hit(row, name, "+".join(by_row[row]), max(by_row[row].values()), by_row[row])
        for row, name in zip(order.tolist(), names, strict=True)
    ]


def _union(answers: Sequence[Answer], removed: Rows) -> Answer:
    rows = np.concatenate([rows for rows, _ in answers])
    similarities = np.concatenate([similarities for _, similarities in answers])
    if len(removed):
        kept = ~np.isin(rows, removed)
        rows, similarities = rows[kept], similarities[kept]
    return ordered(rows, similarities)
