"""This module reads prompt files of plain text: a line is a caption, and an empty line is an empty caption."""

from __future__ import annotations

from collections.abc import Iterator

from memscan.errors import InputError
from memscan.io.compressed import open_stream
from memscan.prompts.rows import Builder, Columns, OpenedFile, RawBatch, byte_lines, too_long

BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def open_text(path: str, columns: Columns) -> OpenedFile:
    """Open a text file. Raises InputError if it cannot be read or is UTF-16."""
    refuse_utf16(path)
    return OpenedFile(_batches(path), "text")


def _batches(path: str) -> Iterator[RawBatch]:
    builder = Builder()
    for line in lines_of(path):
        if line is None:
            builder.reject(too_long())
        else:
            builder.add(line)
        if builder.full:
            yield builder.take()
    if builder:
        yield builder.take()


def lines_of(path: str) -> Iterator[bytes | None]:
    """Yield lines of a file that may be compressed, as `byte_lines` does."""
    return byte_lines(blocks_of(path))


def blocks_of(path: str, size: int = BLOCK) -> Iterator[bytes]:
    """Yield the content of a file that may be compressed, without its byte order mark."""
    with open_stream(path) as file:
        first = True
        while block := file.read(size):
            yield block.removeprefix(_BOM) if first else block
            first = False


def refuse_utf16(path: str) -> None:
    """Raise InputError if a file begins as UTF-16 does."""
    with open_stream(path) as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError("is UTF-16", where=path, hint="convert it: iconv -f UTF-16 -t UTF-8")
