"""Unit vectors in half precision on disk, by which answers of a compressed index are ranked again.

They are mapped into memory and read here and there. Pages that were touched count as this process's memory until they
are given back, which is done every few hundred rows; the system keeps them cached as long as it has room.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from memscan.errors import IndexLoadError
from memscan.index.vectors import Rows, Vectors

# Rows at a time. The kernel maps 16 pages of 4 KiB around each that is touched: at most 32 MiB before they go back.
_PAIRS = 512


class Halves:
    """A file of vectors (N, D), float16.

    Raises:
        IndexLoadError: it is no such file.
    """

    def __init__(self, path: str) -> None:
        try:
            self._vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise IndexLoadError(f"not an array of vectors ({error})", where=path) from error
        if self._vectors.ndim != 2 or self._vectors.dtype != np.float16:
            raise IndexLoadError(f"an array {self._vectors.shape} of {self._vectors.dtype}, not vectors", where=path)
        self._map: mmap.mmap | None = getattr(self._vectors, "_mmap", None)
        if self._map is not None:
            self._map.madvise(mmap.MADV_RANDOM)  # no reading ahead: the neighbours of a row are not wanted

    @staticmethod
    def write(path: str, vectors_ND: Vectors) -> None:
        """Write vectors to a local file."""
        np.save(path, vectors_ND.astype(np.float16))

    def __len__(self) -> int:
        return len(self._vectors)

    def similarities(self, rows_NK: Rows, queries_ND: Vectors) -> Vectors:
        """Inner products of rows (N, K) with their query; -inf for rows outside [0, len).

        Each is computed by itself, so it does not depend on what else is asked for.
        """
        out = np.full(rows_NK.shape, -np.inf, np.float32)
        query, place = np.nonzero((rows_NK >= 0) & (rows_NK < len(self)))
        rows = rows_NK[query, place]
        for start in range(0, len(rows), _PAIRS):
            part = slice(start, start + _PAIRS)
            stored_PD = self._vectors[rows[part]].astype(np.float32)
            out[query[part], place[part]] = np.einsum("pd,pd->p", stored_PD, queries_ND[query[part]])
            self._give_back()
        return out

    def unit(self) -> npt.NDArray[np.float32]:
        """All vectors in single precision, scaled to unit length again."""
        vectors = np.asarray(self._vectors, dtype=np.float32)
        self._give_back()
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)

    def _give_back(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
