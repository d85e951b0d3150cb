"""This module opens files that may be compressed as one stream of bytes.

gzip, Zstandard, bzip2 and xz are recognised by their first bytes.

The content decides, not the name: a browser unpacks `.gz` files and keeps their name, and some tools pack without
saying so. A truncated or damaged file leads to an `InputError` that names it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import IO, Any, cast

import pyarrow as pa

from memscan.errors import InputError
from memscan.io import storage

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}


def without_suffix(name: str) -> str:
    """Return a file's name without the ending that says how it is compressed."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in SUFFIXES if lower.endswith(suffix)), name)


def compression_of(path: str) -> str | None:
    """Return how a file is compressed: "gzip", "zstd", "bzip2", "xz", or None.

    Raises InputError if it cannot be read.
    """
    with storage.open_input(path) as file:
        head = file.read(6)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def open_stream(path: str) -> IO[bytes]:
    """Open a file for reading its content, unpacked where it is compressed.

    Reading raises InputError where the file breaks off or is damaged.

    Raises:
        InputError: it is missing or forbidden.
    """
    kind = compression_of(path)
    file = storage.open_input(path)
    if kind is None:
        return file
    if kind == "gzip":
        inner: Any = gzip.GzipFile(fileobj=file)
    elif kind == "bzip2":
        inner = bz2.BZ2File(file)
    elif kind == "xz":
        inner = lzma.LZMAFile(file)  # noqa: SIM115 - closed with the stream that it reads
    else:
        inner = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return cast("IO[bytes]", io.BufferedReader(_Unpacked(inner, file, path, kind), 1 << 18))


def read_all(path: str) -> bytes:
    """Return the whole content of a file, unpacked. Raises InputError as `open_stream`."""
    with open_stream(path) as file:
        return file.read()


class _Unpacked(io.RawIOBase):
    """This is the content of a compressed file; what its decoder raises is told in one line."""

    def __init__(self, inner: Any, file: IO[bytes], path: str, kind: str) -> None:
        self._file, self._path, self._kind = file, path, kind
        # What is there, not as much as is asked for: of a file that breaks off, all before that is read.
        self._read = getattr(inner, "read1", inner.read)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._read(len(buffer))
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            what = f"its {self._kind} stream breaks off or is damaged ({' '.join(str(error).split())[:200]})"
            raise InputError(what, where=self._path, hint="fetch it again, or take it out") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
