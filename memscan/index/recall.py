"""This module measures the recall of an index: its answers to queries against those of exact search, shard by shard.

Queries are references with noise, as near copies are. Each shard is asked on its own, exactly and through its index;
the union of both is what the whole index and an exact index would have answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memscan.index import vectors as faiss_vectors
from memscan.index.choice import is_compressed
from memscan.index.manifest import Manifest
from memscan.index.search import union, wanted
from memscan.index.shards import OpenShard
from memscan.index.vectors import TIE, Answer, Rows, Vectors, load_faiss, ordered

QUERIES = 256
RECALL_AT = (1, 10)
# Cosine of a query and its reference; SSCD's publishers call .75 a copy.
QUERY_COSINE = 0.85
QUERY_SEED = 4321


@dataclass(frozen=True)
class ShardAnswer:
    """This is what one shard answers to queries of one region.

    The exact answer has rows and similarities. The answer through the shard's index has rows, the similarities that the
    index gave, and exact ones.
    """

    exact: Answer
    found: tuple[Rows, Vectors, Vectors]


def make_queries(vectors_ND: Vectors, count: int = QUERIES) -> Vectors:
    """Return near copies of at most `count` of the unit vectors, at a cosine of about .85."""
    rng = np.random.default_rng(QUERY_SEED)
    chosen = vectors_ND[np.sort(rng.choice(len(vectors_ND), min(count, len(vectors_ND)), replace=False))]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    noise -= (noise * chosen).sum(axis=1, keepdims=True) * chosen
    noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-12)
    queries = QUERY_COSINE * chosen + (1 - QUERY_COSINE**2) ** 0.5 * noise
    return np.asarray(queries / np.linalg.norm(queries, axis=1, keepdims=True), dtype=np.float32)


def query_shard(shard: OpenShard, region: str, queries_ND: Vectors, k: int = max(RECALL_AT)) -> ShardAnswer:
    """Ask one shard."""
    vectors_ND = shard.vectors(region)
    flat = load_faiss().IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)
    rows, similarities = faiss_vectors.search(flat, queries_ND, k, shard.removed)
    exact = np.where(rows < 0, -1, rows + shard.start), similarities
    found, given = shard.candidates(region, queries_ND, wanted(shard.manifest, k))
    ranked = shard.rank(region, found, queries_ND) if is_compressed(shard.manifest.factory) else given
    return ShardAnswer(exact, (found, given, ranked))


def recall_of(manifest: Manifest, answers: Sequence[Mapping[str, ShardAnswer]]) -> dict[str, float]:
    """Return the recall by "region@k", from the answers of all shards in order.

    A row counts as found where its similarity reaches that of the exact k-th: of equal copies any one will do.
    """
    recall = {}
    for region in answers[0]:
        for k in RECALL_AT:
            truth = union([shard[region].exact for shard in answers], k)[1]
            found = _merged([shard[region].found for shard in answers], wanted(manifest, max(RECALL_AT)))[:, :k]
            possible = np.isfinite(truth)
            floor = np.min(np.where(possible, truth, np.inf), axis=1, keepdims=True)
            # Both are of the stored vectors, once scaled to unit length again and once as they are rounded.
            slack = 1e-4 if is_compressed(manifest.factory) else 10 * TIE
            hits = np.minimum((found >= floor - slack).sum(axis=1), possible.sum(axis=1))
            recall[f"{region}@{k}"] = round(float(hits.sum() / possible.sum()), 4)
    return recall


def _merged(parts: Sequence[tuple[Rows, Vectors, Vectors]], count: int) -> Vectors:
    """Exact similarities of the index's answer, best first."""
    rows, given, exact = (np.concatenate([part[at] for part in parts], axis=1) for at in range(3))
    order = np.lexsort((rows, -given), axis=1)[:, :count]
    rows, exact = np.take_along_axis(rows, order, axis=1), np.take_along_axis(exact, order, axis=1)
    return ordered(rows, exact)[1]
