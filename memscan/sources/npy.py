"""This module reads rows of .npy files, local or on s3://, without reading the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from memscan.errors import InputError, MemscanError
from memscan.io import storage
from memscan.models.folders import first_line


@dataclass(frozen=True)
class Header:
    """This is the shape (N, D), the dtype, and the place where the rows begin in the file."""

    shape: tuple[int, int]
    dtype: np.dtype[np.floating]
    offset: int


@lru_cache(maxsize=4096)
def read_header(path: str) -> Header:
    """Return what an .npy file holds.

    Raises:
        InputError: not an .npy file of float vectors in rows, or it is shorter than it says.
    """
    with storage.open_input(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(file)
        except MemscanError:
            raise
        except Exception as error:  # numpy's parser lets through what the tokenizer raises, of several kinds
            raise InputError(f"not an .npy file ({first_line(error)})", where=path) from error
        offset = file.tell()
    if len(shape) != 2 or min(shape) < 0 or columns_first or dtype.kind != "f":
        raise InputError(f"an array {shape} of {dtype}, not rows of vectors", where=path)
    if storage.file_size(path) < offset + shape[0] * shape[1] * dtype.itemsize:
        raise InputError(f"is shorter than its {shape[0]} vectors", where=path, hint="it is truncated: get it again")
    return Header((int(shape[0]), int(shape[1])), dtype, offset)


def read_rows(path: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return rows [start, stop) in single precision."""
    header = read_header(path)
    width = header.shape[1] * header.dtype.itemsize
    with storage.open_input(path) as file:
        file.seek(header.offset + start * width)
        data = file.read((stop - start) * width)
    return np.frombuffer(data, header.dtype).reshape(stop - start, -1).astype(np.float32)
