"""FAISS, and nothing but FAISS: inner products of unit vectors, ids are rows of references.parquet.

The answer of a search is deterministic: equal similarities are ordered by row, and where they straddle the k-th place
more are fetched until the tie is whole. Training images repeat, so ties are the rule here, not the exception.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.errors import IndexLoadError, InputError, MemscanError

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

TRAIN_SAMPLE = 262_144
TRAIN_SEED = 1234
# Equal vectors may differ by some units in the last place of float32, depending on where they lie in a batch.
TIE = 1e-6
_UNIT_TOLERANCE = 1e-3


def load_faiss() -> Any:
    """The faiss module. Raises MemscanError where neither faiss-cpu nor faiss-gpu is installed."""
    try:
        import faiss
    except ImportError as error:
        raise MemscanError(
            "FAISS is not installed", where="faiss", hint="pip install 'memscan[cpu]' or 'memscan[gpu]'"
        ) from error
    return faiss


def check_vectors(vectors_ND: npt.ArrayLike, what: str) -> Vectors:
    """The vectors as contiguous float32 (N, D).

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
    """An empty FAISS index by factory string and inner product, trained on a sample.

    Training is done by one thread from fixed seeds, so that the same sample gives the same bytes.

    Args:
        sample_ND: vectors to train on (`training_rows`).
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
            index.train(sample_ND)
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


def filled(template: Any, vectors_ND: Vectors) -> Any:
    """A copy of a trained, empty index that holds the vectors; the same bytes for the same input."""
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
    """The vectors of an index that keeps them as they are, (N, D)."""
    faiss = load_faiss()
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.make_direct_map()
    vectors: Vectors = index.reconstruct_n(0, index.ntotal)
    return vectors


def training_rows(count: int) -> Rows:
    """Rows to train on, in order: all, or 262,144 of them with a fixed seed."""
    if count <= TRAIN_SAMPLE:
        return np.arange(count)
    return np.sort(np.random.default_rng(TRAIN_SEED).choice(count, TRAIN_SAMPLE, replace=False))


def write(path: str, index: Any) -> None:
    """Write an index file to a local path."""
    load_faiss().write_index(index, path)


def read(path: str, factory: str, nprobe: int = 1, *, mapped: bool = True) -> Any:
    """Read a local index file that has been verified.

    Args:
        factory: that the file was built by.
        nprobe: lists to search where it has lists.
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
    return index


def search(index: Any, queries_ND: Vectors, k: int) -> list[tuple[Rows, Vectors]]:
    """The `k` nearest rows of each query, most similar first, equal ones by row.

    Fewer than `k` where the index holds fewer, or its searched lists do.

    Returns:
        A pair (rows, similarities) a query.
    """
    found: list[tuple[Rows, Vectors] | None] = [None] * len(queries_ND)
    pending, fetch = list(range(len(queries_ND))), min(k + 8, index.ntotal)
    while pending:
        similarities, rows = index.search(queries_ND[pending], fetch)
        unsettled = []
        for query, row_k, similarity_k in zip(pending, rows, similarities, strict=True):
            valid = row_k >= 0  # -1 fills up where the searched lists hold fewer
            best = ordered(row_k[valid], similarity_k[valid])
            if fetch < index.ntotal and valid.all() and _tie_is_cut(best[1], k):
                unsettled.append(query)
            else:
                found[query] = (best[0][:k], best[1][:k])
        pending, fetch = unsettled, min(fetch * 4, index.ntotal)
    return [pair for pair in found if pair is not None]


def ordered(rows: Rows, similarities: Vectors) -> tuple[Rows, Vectors]:
    """By falling similarity; neighbours closer than TIE count as equal and are ordered by row."""
    by_similarity = np.argsort(-similarities, kind="stable")
    rows, similarities = rows[by_similarity], similarities[by_similarity]
    group = np.concatenate([[0], np.cumsum(-np.diff(similarities) > TIE)]) if len(rows) else rows
    final = np.lexsort((rows, group))
    return rows[final], similarities[final]


def _tie_is_cut(similarities: Vectors, k: int) -> bool:
    """Whether the last one fetched may equal the k-th, so that a smaller row may have been left out."""
    return len(similarities) >= k and bool(similarities[k - 1] - similarities[-1] <= TIE)
