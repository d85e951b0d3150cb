"""This module contains all calls of FAISS.

Similarities are inner products of unit vectors, and ids are rows of a shard.

The answer of a search is deterministic: equal similarities are ordered by row, and where they straddle the k-th place
more rows are fetched until the tie is complete. Training images repeat, so ties are frequent.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.errors import IndexLoadError, InputError, MemscanError

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Answer = tuple[Rows, Vectors]  # (N, k) each: rows, -1 where there is none, and their similarities, then -inf

TRAIN_AT_LEAST, TRAIN_AT_MOST = 65_536, 10_485_760
TRAIN_A_LIST = 64  # FAISS asks for 39 to 256
TRAIN_SEED = 1234
# From so many lists on, k-means in two levels: at 65,536 lists it takes a hundredth of the time.
TWO_LEVELS_FROM = 16_384
KMEANS_ROUNDS = 10
# Equal vectors may differ by some units in the last place of float32, depending on where they lie in a batch.
TIE = 1e-6
_UNIT_TOLERANCE = 1e-3


def load_faiss() -> Any:
    """Return the faiss module. Raises MemscanError if neither faiss-cpu nor faiss-gpu is installed."""
    try:
        import faiss
    except ImportError as error:
        raise MemscanError(
            "FAISS is not installed", where="faiss", hint="pip install faiss-cpu (or faiss-gpu)"
        ) from error
    return faiss


def check_vectors(vectors_ND: npt.ArrayLike, what: str) -> Vectors:
    """Return the vectors as contiguous float32 (N, D).

    Raises:
        ValueError: not two-dimensional, not finite, or a row is not of unit length (within 1e-3).
    """
    vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"{what} vectors have shape {vectors.shape}, expected (N, D)")
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))  # also true for NaN
    if wrong.size:
        raise ValueError(f"{what} vector of row {wrong[0]} has length {norms[wrong[0]]:g}, expected 1")
    return vectors


def train(sample_ND: Vectors, factory: str, count: int | None = None) -> Any:
    """Return an empty FAISS index by factory string and inner product, trained on a sample.

    Training is done by one thread from fixed seeds, so that the same sample gives the same bytes.

    Args:
        sample_ND: vectors to train on, `training_count` of them where there are as many.
        count: vectors the index is meant for, for the message of a failure.

    Raises:
        InputError: the factory string is unknown to FAISS, or there are too few vectors to train it.
    """
    faiss = load_faiss()
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(1)
        index = faiss.index_factory(sample_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            _train(index, sample_ND)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"FAISS cannot build {factory!r} for {count or len(sample_ND)} vectors of length "
            f"{sample_ND.shape[1]}: {reason}",
            where="index.factory",
            hint="Flat always works; IVF needs at least as many vectors as lists",
        ) from error
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def check_factory(factory: str) -> None:
    """Refuse a factory string that FAISS cannot parse, before any vector is there to train on.

    It is tried on a length that every sub-quantiser of it divides; whether it fits the real one, training tells.

    Raises:
        InputError: names the string.
    """
    faiss = load_faiss()
    parts = [int(number) for number in re.findall(r"PQ(\d+)", factory)]
    try:
        faiss.index_factory(64 * math.lcm(1, *parts), factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"FAISS does not know the index type {factory!r} ({str(error).strip().splitlines()[-1]})",
            where="index.factory",
            hint="for example Flat, IVF256,Flat or auto",
        ) from error


def _train(index: Any, sample_ND: Vectors) -> None:
    """Train transform, lists and codes, with fewer rounds than FAISS' defaults: more did not change R@1."""
    faiss = load_faiss()
    inner, sample = index, sample_ND
    if isinstance(index, faiss.IndexPreTransform):
        for at in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(at))
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter, transform.max_train_points = KMEANS_ROUNDS, TRAIN_AT_LEAST
            if not transform.is_trained:
                transform.train(sample)
            sample = transform.apply(sample)
        inner = faiss.downcast_index(index.index)
    lists = faiss.try_extract_index_ivf(inner)
    if lists is not None:
        lists.cp.niter = KMEANS_ROUNDS
        lists.cp.max_points_per_centroid = TRAIN_A_LIST
        lists.cp.min_points_per_centroid = 1  # small indexes are trained on what there is, without a warning
        if lists.nlist >= TWO_LEVELS_FROM:
            _train_lists(lists, sample)
    inner.train(sample)
    index.is_trained = True


def _train_lists(lists: Any, sample_ND: Vectors) -> None:
    """Centroids of many lists by k-means in two levels: coarse clusters, then each on its own."""
    faiss = load_faiss()

    def clustered(vectors_ND: Vectors, count: int) -> Any:
        means = faiss.Kmeans(vectors_ND.shape[1], count, niter=KMEANS_ROUNDS, spherical=True, min_points_per_centroid=1)
        means.train(vectors_ND)
        return means

    coarse = clustered(sample_ND, round(lists.nlist**0.5))
    cluster = coarse.assign(sample_ND)[1]
    sizes = np.bincount(cluster, minlength=coarse.k)
    # Lists in proportion to what a cluster holds; at most one a vector, so that each can be trained.
    shares = np.diff(np.concatenate([[0], np.cumsum(sizes)]) * lists.nlist // len(sample_ND))
    order = np.argsort(cluster, kind="stable")
    ends = np.cumsum(sizes)
    centroids = [
        clustered(sample_ND[order[end - size : end]], int(share)).centroids
        for size, end, share in zip(sizes, ends, shares, strict=True)
        if share
    ]
    lists.quantizer.train(np.concatenate(centroids))
    lists.quantizer.add(np.concatenate(centroids))


def filled(template: Any, vectors_ND: Vectors) -> Any:
    """Return a copy of a trained, empty index that holds the vectors; the same bytes for the same input."""
    faiss = load_faiss()
    index = faiss.clone_index(template)
    threads = faiss.omp_get_max_threads()
    try:
        if "HNSW" in type(index).__name__:
            faiss.omp_set_num_threads(1)  # several threads build another graph every time
        index.add(vectors_ND)
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def stored(index: Any) -> Vectors:
    """Return the vectors of an index that keeps them as they are, (N, D)."""
    faiss = load_faiss()
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.make_direct_map()
    vectors: Vectors = index.reconstruct_n(0, index.ntotal)
    if lists is not None:
        lists.set_direct_map_type(faiss.DirectMap.NoMap)
    return vectors


def training_count(factory: str) -> int:
    """Return the number of vectors to train on.

    It is 64 per list, but at least 65,536 for transform and codes, and none for a type without training.
    """
    lists = re.search(r"IVF(\d+)", factory)
    if lists is None and "PQ" not in factory and "SQ" not in factory:
        return 1
    wanted = TRAIN_A_LIST * int(lists[1]) if lists else 0
    return min(max(wanted, TRAIN_AT_LEAST), TRAIN_AT_MOST)


def training_rows(count: int, factory: str) -> Rows:
    """Return rows to train on, ascending: all, or `training_count` of them by a fixed seed."""
    wanted = training_count(factory)
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(TRAIN_SEED).choice(count, wanted, replace=False))


def write(path: str, index: Any) -> None:
    """Write an index file to a local path."""
    load_faiss().write_index(index, path)


def read(path: str, factory: str, nprobe: int = 1, *, mapped: bool = True) -> Any:
    """Read a local index file that has been verified.

    Args:
        factory: that the file was built by.
        nprobe: lists to search where it has lists; a graph (HNSW) looks at max(64, 4 nprobe) candidates.
        mapped: into memory, so that what is never searched is never read; such an index cannot be added to.

    Raises:
        IndexLoadError: FAISS cannot read it.
    """
    faiss = load_faiss()
    # One flag maps the lists of IVF indexes, the other flat and graph indexes.
    flags = (faiss.IO_FLAG_MMAP if "IVF" in factory else faiss.IO_FLAG_MMAP_IFC) if mapped else 0
    try:
        index = faiss.read_index(path, flags)
    except RuntimeError as error:
        raise IndexLoadError(f"FAISS cannot read it: {str(error).splitlines()[-1]}", where=path) from error
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.nprobe = min(nprobe, lists.nlist)
    graph = faiss.downcast_index(index)
    if hasattr(graph, "hnsw"):
        graph.hnsw.efSearch = max(64, 4 * nprobe)
    return index


def to_device(index: Any, device: str) -> Any:
    """The index on a GPU where faiss-gpu is installed, there is a GPU and the type can live there; else as it is."""
    faiss = load_faiss()
    if device != "cuda" or not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError:  # HNSW and fast-scan codes are for CPUs only
        return index


@dataclass(frozen=True)
class Lists:
    """This says where an IVF index looks for queries, which is the same in all copies of one template.

    Attributes:
        transformed: queries (N, D') as the lists hold vectors.
        numbers, distances: (N, nprobe) of the lists, nearest first.
    """

    transformed: Vectors
    numbers: Rows
    distances: Vectors


def find_lists(index: Any, queries_ND: Vectors) -> Lists | None:
    """Return the lists to look into; None for an index that has none, or is on a GPU."""
    faiss = load_faiss()
    inner, transformed = _inner(index), queries_ND
    if not isinstance(inner, faiss.IndexIVF):
        return None
    if inner is not index:
        for at in range(index.chain.size()):
            transformed = faiss.downcast_VectorTransform(index.chain.at(at)).apply(transformed)
    distances, numbers = inner.quantizer.search(transformed, inner.nprobe)
    return Lists(transformed, numbers, distances)


def _inner(index: Any) -> Any:
    faiss = load_faiss()
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def search(
    index: Any,
    queries_ND: Vectors,
    k: int,
    removed: Rows | None = None,
    *,
    ties: bool = True,
    lists: Lists | None = None,
) -> Answer:
    """Return the `k` nearest rows of each query, most similar first, equal ones by row.

    Args:
        lists: of the queries, where they have been found already.
        removed: rows that are in no answer, ascending.
        ties: fetch more until a tie across the k-th place is complete. Without it, which of them are in the answer is
            FAISS' choice.

    Returns:
        Rows (N, k) and similarities (N, k), filled up with -1 and -inf where the index or its searched lists hold
        fewer.
    """
    out = empty_answer(len(queries_ND), k)
    found = find_lists(index, queries_ND) if lists is None else lists
    pending = np.arange(len(queries_ND))
    fetch = min(k + (8 if ties else 0) + (0 if removed is None else min(len(removed), k)), index.ntotal)
    while len(pending) and fetch:
        if found is None:
            similarities, rows = index.search(queries_ND[pending], fetch)
        else:
            similarities, rows = _inner(index).search_preassigned(
                found.transformed[pending], fetch, found.numbers[pending], found.distances[pending]
            )
        exhausted = (rows < 0).any(axis=1) | (fetch >= index.ntotal)  # -1: the searched lists hold no more
        if removed is not None and len(removed):
            rows = np.where(np.isin(rows, removed), -1, rows)
        rows, similarities = ordered(rows, np.where(rows < 0, -np.inf, similarities))
        held = (rows >= 0).sum(axis=1)
        settled = exhausted | (held >= k)
        if ties:
            # The last one fetched may equal the k-th, and a smaller row may have been left out.
            last = similarities[np.arange(len(rows)), held - 1]
            cut = similarities[:, min(k, fetch) - 1] <= last + TIE
            settled = exhausted | ((held >= k) & ~cut)
        done, width = pending[settled], min(k, fetch)
        out[0][done, :width], out[1][done, :width] = rows[settled, :width], similarities[settled, :width]
        pending, fetch = pending[~settled], min(fetch * 4, index.ntotal)
    return out


def empty_answer(queries: int, k: int) -> Answer:
    """Return an answer of nothing."""
    return np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32)


def ordered(rows_NK: Rows, similarities_NK: Vectors) -> Answer:
    """Return each line by falling similarity; neighbours closer than TIE count as equal and are ordered by row."""
    order = np.argsort(-similarities_NK, axis=1, kind="stable")
    rows = np.take_along_axis(rows_NK, order, axis=1)
    similarities = np.take_along_axis(similarities_NK, order, axis=1)
    steps = np.zeros(similarities.shape, np.int64)
    finite = np.where(np.isfinite(similarities), similarities, -10)  # below any cosine
    steps[:, 1:] = -np.diff(finite, axis=1) > TIE
    final = np.lexsort((rows, np.cumsum(steps, axis=1)), axis=1)
    return np.take_along_axis(rows, final, axis=1), np.take_along_axis(similarities, final, axis=1)
