"""Near-duplicates with their references, small enough for brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from memscan.models.specification import ModelSpec
from memscan.records import REFERENCES, REGIONS

EMBEDDER = ModelSpec("embedder", "planted", "ab" * 32, "square64")
SEGMENTER = ModelSpec("segmenter", "planted", "ef" * 32, "square64")


@dataclass(frozen=True)
class Copies:
    """References (N rows), unit vectors (N, 32) of three regions, and queries (Q, 32) that are further copies."""

    table: pa.Table
    vectors: dict[str, np.ndarray]
    queries: dict[str, np.ndarray]


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="session")
def copies() -> Copies:
    """600 originals with four near copies each, some of them exact: 2,400 references, 100 queries."""
    rng = np.random.default_rng(5)
    vectors, queries = {}, {}
    for region in REGIONS:
        originals = unit(rng.standard_normal((600, 32)))
        near = unit(np.repeat(originals, 4, axis=0) + 0.06 * rng.standard_normal((2400, 32)))
        near[1000:1040] = near[17]  # ties over the edge of shards
        order = rng.permutation(2400)
        vectors[region] = near[order]
        queries[region] = unit(originals[:100] + 0.06 * rng.standard_normal((100, 32)))
        queries[region][99] = near[17]
    names = pa.array([f"ref-{row:05d}" for row in range(2400)])
    nothing = [pa.nulls(2400, field.type) for field in REFERENCES if field.name != "reference_id"]
    return Copies(pa.Table.from_arrays([names, *nothing], schema=REFERENCES), vectors, queries)
