"""This module keeps unit vectors in half precision on disk, to rank answers of a compressed index again.

A row is read from the file with one system call, and not through a memory mapping, because the pages around each row
would then count as this process's memory (226 MB after 1,000 queries). The system caches what was read as long as it
has room.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from memscan.errors import IndexLoadError
from memscan.index.vectors import Rows, Vectors

_PAIRS = 2048  # rows in single precision at a time


class Halves:
    """This is a file of vectors (N, D), float16.

    It holds no open file, because an index has hundreds of these.

    Raises:
        IndexLoadError: it is no such file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise IndexLoadError(f"not an array of vectors ({error})", where=path) from error
        if mapped.ndim != 2 or mapped.dtype != np.float16 or not isinstance(mapped, np.memmap):
            raise IndexLoadError(f"an array {mapped.shape} of {mapped.dtype}, not vectors", where=path)
        self._count, self._dimension = mapped.shape
        self._offset = mapped.offset

    @staticmethod
    def write(path: str, vectors_ND: Vectors) -> None:
        """Write vectors to a local file."""
        np.save(path, vectors_ND.astype(np.float16))

    def __len__(self) -> int:
        return int(self._count)

    def similarities(self, rows_NK: Rows, queries_ND: Vectors) -> Vectors:
        """Return inner products of rows (N, K) with their query; -inf for rows outside [0, len).

        Each is computed by itself, so it does not depend on the other rows that are requested.
        """
        out = np.full(rows_NK.shape, -np.inf, np.float32)
        query, place = np.nonzero((rows_NK >= 0) & (rows_NK < len(self)))
        rows = rows_NK[query, place]
        for start in range(0, len(rows), _PAIRS):
            part = slice(start, start + _PAIRS)
            stored_PD = self._read(rows[part]).astype(np.float32)
            out[query[part], place[part]] = np.einsum("pd,pd->p", stored_PD, queries_ND[query[part]])
        return out

    def unit(self) -> npt.NDArray[np.float32]:
        """Return all vectors in single precision, scaled to unit length again."""
        vectors = np.load(self._path, allow_pickle=False).astype(np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)

    def _read(self, rows: Rows) -> npt.NDArray[np.float16]:
        """Return rows (P, D). Raises IndexLoadError if the file has become shorter."""
        out = np.empty((len(rows), self._dimension), np.float16)
        width = self._dimension * out.itemsize
        view = memoryview(out.data).cast("B")
        file = os.open(self._path, os.O_RDONLY)
        try:
            for at, row in enumerate(rows.tolist()):
                if os.preadv(file, [view[at * width : (at + 1) * width]], self._offset + row * width) != width:
                    raise IndexLoadError(f"ends before row {row}", where=self._path)
        finally:
            os.close(file)
        return out
