"""Many shards are one index, in whichever way they are reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscan.errors import IntegrityError
from memscan.index import ReferenceIndex, write_index
from memscan.index.choice import choose, is_compressed, parse_memory
from memscan.index.halves import Halves
from memscan.index.recall import make_queries, query_shard, recall_of
from memscan.index.shards import OpenShard
from memscan.models.specification import ModelSpec
from memscan.records import REGIONS

EMBEDDER = ModelSpec("embedder", "planted", "ab" * 32, "square64")
SEGMENTER = ModelSpec("segmenter", "planted", "ef" * 32, "square64")
NOTHING = np.empty(0, dtype=np.int64)
# A factory with lists, and with as many lists searched as there are: then IVF is exact. HNSW is not here: a graph over
# a part is another graph, and no promise is made for it.
FACTORIES = [
    ("Flat", 1),
    ("IVF16,Flat", 4),
    ("IVF16,PQ16x4np", 4),
    pytest.param("OPQ8,IVF16,PQ8x4fsr", 4, marks=pytest.mark.long),
]


def answers(index: ReferenceIndex, queries: Any, k: int = 5) -> list[list[tuple[int, str, str, float]]]:
    return [
        [(hit.row, hit.reference_id, hit.found_by, round(hit.similarity, 5)) for hit in hits]
        for hits in index.search(queries, k)
    ]


@pytest.mark.parametrize(("factory", "nprobe"), FACTORIES)
def test_shards_answer_as_one_index(tmp_path: Path, copies: Any, factory: str, nprobe: int) -> None:
    """Also where equal vectors lie in several shards, and where the plan opens one shard at a time."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    one = write_index(whole, copies.table, copies.vectors, factory, nprobe, EMBEDDER, SEGMENTER)
    many = write_index(parts, copies.table, copies.vectors, factory, nprobe, EMBEDDER, SEGMENTER, shard_rows=500)
    assert (len(one.shards), len(many.shards)) == (1, 5)
    assert one.template == many.template
    expected = answers(ReferenceIndex.open(whole, EMBEDDER), copies.queries)
    assert answers(ReferenceIndex.open(parts, EMBEDDER), copies.queries) == expected
    assert answers(ReferenceIndex.open(parts, EMBEDDER, access="shard-major"), copies.queries) == expected
    assert all(len(hits) >= 5 for hits in expected)


@pytest.mark.parametrize(("factory", "nprobe"), [*FACTORIES[1:], ("HNSW16", 16)])
def test_approximate_types_find_the_copy_that_exact_search_finds(
    tmp_path: Path, copies: Any, factory: str, nprobe: int
) -> None:
    """R@1 against brute force over the vectors; the compressed ones only through ranking by half precision vectors."""
    folder = str(tmp_path / "index")
    write_index(folder, copies.table, copies.vectors, factory, nprobe, EMBEDDER, SEGMENTER, shard_rows=1000)
    found = ReferenceIndex.open(folder, EMBEDDER).nearest(copies.queries, 1)
    for region in REGIONS:
        exact = copies.queries[region].astype(np.float64) @ copies.vectors[region].astype(np.float64).T
        # Half precision moves a cosine by less than 1e-3 (11 bits); a true neighbour may lose to one that close.
        assert (found[region][1][:, 0] >= exact.max(axis=1) - 1e-3).mean() >= 0.95


@pytest.mark.parametrize("shard_rows", [10_000, 500])
def test_exact_search_has_a_recall_of_one_in_one_shard_and_in_many(
    tmp_path: Path, copies: Any, shard_rows: int
) -> None:
    folder = str(tmp_path / "index")
    manifest = write_index(folder, copies.table, copies.vectors, "Flat", 1, EMBEDDER, SEGMENTER, shard_rows=shard_rows)
    starts = zip(manifest.shards, manifest.starts(), strict=False)
    shards = [OpenShard(str(Path(folder, "shards", at.name)), manifest, at, start, 1, NOTHING) for at, start in starts]
    assert len(shards) == -(-len(copies.vectors["whole"]) // shard_rows)
    queries = {region: make_queries(copies.vectors[region], 20) for region in REGIONS}
    answers_of = [{region: query_shard(shard, region, queries[region]) for region in REGIONS} for shard in shards]
    assert set(recall_of(manifest, answers_of).values()) == {1.0}


def test_half_precision_vectors_rank_as_they_are(tmp_path: Path, copies: Any) -> None:
    path = str(tmp_path / "whole.f16.npy")
    vectors, queries = copies.vectors["whole"], copies.queries["whole"]
    Halves.write(path, vectors)
    halves = Halves(path)
    rows = np.random.default_rng(0).integers(-3, len(vectors) + 3, (len(queries), 30))
    found = halves.similarities(rows, queries)
    inside = (rows >= 0) & (rows < len(vectors))
    exact = np.einsum("nkd,nd->nk", vectors[np.clip(rows, 0, len(vectors) - 1)], queries)
    np.testing.assert_allclose(found[inside], exact[inside], atol=1e-3)  # eps of float16 is 2^-11
    assert np.isneginf(found[~inside]).all()
    np.testing.assert_array_equal(halves.similarities(rows[:, :1], queries), found[:, :1])


@pytest.mark.parametrize("name", ["whole.f16.npy", "ids.arrow"])
def test_every_file_of_a_compressed_shard_is_verified(tmp_path: Path, copies: Any, name: str) -> None:
    folder = str(tmp_path / "index")
    write_index(folder, copies.table, copies.vectors, "IVF16,PQ16x4np", 4, EMBEDDER, SEGMENTER, shard_rows=1000)
    path = Path(folder, "shards", "00001", name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="sha256 is") as caught:
        ReferenceIndex.open(folder, EMBEDDER)
    assert caught.value.where == str(path)
    with pytest.raises(IntegrityError, match="sha256 is"):
        ReferenceIndex.open(folder, EMBEDDER, verify="once")


def test_the_type_follows_size_and_memory() -> None:
    assert choose(10_000, 512).factory == "Flat"
    middle = choose(100_000, 512)
    assert middle.factory == "IVF1024,Flat"
    assert not is_compressed(middle.factory)
    large = choose(1_000_000, 512)
    assert is_compressed(large.factory)
    assert "ranked again" in large.why
    tight = choose(100_000, 512, memory=parse_memory("100MB"))
    assert is_compressed(tight.factory)
    assert "do not fit into 0.1 GB" in tight.why
    assert "HNSW32" in choose(5_000_000_000, 512).factory
    for count in (10, 1000, 300_000, 10**7, 10**9):
        for dimension in (16, 48, 512, 768):
            assert choose(count, dimension).nprobe >= 1
