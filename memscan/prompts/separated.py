"""This module reads prompt files of separated values, such as CSV and TSV.

It finds out the dialect of each file.

pyarrow parses the blocks whose quotes are all in the right places. The strict reader of `dialect` parses all others;
for the former it would give the same result. Blank lines are not rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv

from memscan.errors import InputError, Reason
from memscan.prompts import rows as row_limits
from memscan.prompts.dialect import NO_SEPARATOR, Dialect, Evidence, Record, RecordReader, find_quoting, fits
from memscan.prompts.rows import CAPTION_NAMES, Bad, Builder, Columns, OpenedFile, RawBatch, choose_columns, find_column
from memscan.prompts.text import blocks_of, refuse_utf16

_SEPARATORS = (b",", b";", b"\t", b"|")
_BLOCK = 2 << 20
_SAMPLE_LINES = 2000  # that a dialect is found by
_SAMPLE_BYTES = 1 << 20
_LOOK_AHEAD = 64 << 20  # bytes in which the first quote is looked for
_ADDRESS = re.compile(rb"\s*[a-zA-Z][a-zA-Z0-9+.-]*://\S*\s*$")


@dataclass(frozen=True)
class _Shape:
    """This is what was found out: dialect, width, and the places of caption and URL."""

    dialect: Dialect
    width: int
    caption: int
    url: int | None
    sloppy: bool


def open_separated(path: str, columns: Columns) -> OpenedFile:
    """Open a CSV.

    Raises:
        InputError: it is UTF-16, its header cannot be read, or it lacks the caption column.
    """
    refuse_utf16(path)
    sample, complete = _sample(path)
    if not any(sample):
        return OpenedFile(iter(()), "CSV")
    dialect, evidence = _find_dialect(path, sample, complete, columns)
    header = next(RecordReader(dialect).read(list(sample), 1))
    if header.problem:
        raise InputError(f"the header cannot be read: {header.problem}", where=path)
    names = [field.decode("utf-8", "replace").strip() for field in header.fields]
    if not columns.header:
        columns = _numbered(columns, len(names), path)
        names = [f"column {number}" for number in range(1, len(names) + 1)]
    chosen = choose_columns(names, columns, path)
    if not columns.header:
        _refuse_addresses(path, dialect, sample, chosen.caption)
    width = len(names)
    while width > max(chosen.caption, chosen.url or 0) + 1 and not names[width - 1]:
        width -= 1  # a header that ends in separators
    shape = _Shape(dialect, width, chosen.caption, chosen.url, evidence.sloppy)
    return OpenedFile(
        _Reader(path, shape, header.lines if columns.header else 0, header.line).batches(),
        "TSV" if dialect.separator == b"\t" else "CSV",
        names[chosen.caption],
        None if chosen.url is None else names[chosen.url],
        chosen.kin,
        None if dialect.separator == NO_SEPARATOR else dialect.separator.decode(),
        dialect.quoting,
    )


def _numbered(columns: Columns, width: int, path: str) -> Columns:
    """Return columns of a file without a header: numbers, or the only one."""
    caption = 1 if columns.caption is None and width == 1 else columns.caption
    for role, wanted in (("caption", caption), ("url", columns.url)):
        if isinstance(wanted, str) and not wanted.isdigit():
            what = f"has no header (prompts.header: false) and so no column {wanted!r}"
            raise InputError(what, where=path, hint=f"give prompts.{role}_column as a number, from 1 to {width}")
    if caption is None:
        what = f"has {width} columns and no header (prompts.header: false)"
        raise InputError(what, where=path, hint="give prompts.caption_column as a number, from 1 on")
    return Columns(int(caption), None if columns.url is None else int(columns.url), header=False)


def _refuse_addresses(path: str, dialect: Dialect, sample: list[bytes], caption: int) -> None:
    """A column number is easily wrong by one: then it is the one with the URLs, and nobody would see it."""
    records = [r.fields for r in RecordReader(dialect).read(list(sample[:100]), 1) if len(r.fields) > caption]
    if records and all(_ADDRESS.match(fields[caption]) for fields in records):
        what = f"column {caption + 1} holds addresses, not captions"
        raise InputError(what, where=path, hint="prompts.caption_column counts columns from 1 on")


# --- dialect ----------------------------------------------------------------------------------------------------------


def _sample(path: str) -> tuple[list[bytes], bool]:
    """Return the first lines without their ends, and whether these are all."""
    data = b""
    for block in blocks_of(path):
        data += block
        if len(data) >= _SAMPLE_BYTES:
            break
    lines = _lines(data)
    complete = len(data) < _SAMPLE_BYTES
    if not complete and len(lines) > 1:
        lines.pop()
    return lines[:_SAMPLE_LINES], complete and len(lines) <= _SAMPLE_LINES


def _lines(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def _find_dialect(path: str, sample: list[bytes], complete: bool, columns: Columns) -> tuple[Dialect, Evidence]:
    """Return the separator under which the header names a caption column, then the one with the most even records."""
    best, best_score = (Dialect(NO_SEPARATOR), Evidence()), (False, -1.0, 0)
    few = sample[:100]
    usual = _SEPARATORS if not path.lower().partition(".tsv")[1] else (b"\t", *_SEPARATORS)
    for separator in usual:
        quoting, evidence = find_quoting(few, separator, complete and len(few) == len(sample))
        header = next(RecordReader(Dialect(separator, quoting)).read(list(few), 1)).fields
        if len(header) < 2:
            continue
        names = [name.decode("utf-8", "replace") for name in header]
        wanted = columns.caption if columns.header or columns.caption is None else int(columns.caption)
        known = find_column(names, wanted, CAPTION_NAMES) is not None
        score = (known, round(evidence.share, 3), len(header))
        if score > best_score:
            best, best_score = (Dialect(separator, quoting), evidence), score
    separator = best[0].separator
    lines = sample if complete or any(b'"' in line for line in sample) else [*sample, *_first_quotes(path)]
    quoting, evidence = find_quoting(lines, separator, complete)
    return Dialect(separator, quoting), evidence


def _first_quotes(path: str) -> list[bytes]:
    """Return lines from the first one with a quote on, as many as a sample has; none if there is no quote nearby."""
    rest, seen = b"", 0
    found: list[bytes] = []
    for block in blocks_of(path):
        seen += len(block)
        if not found and b'"' not in block:
            rest = block[block.rfind(b"\n") + 1 :]
            if seen > _LOOK_AHEAD:
                return []
            continue
        data = rest + block
        rest = data[data.rfind(b"\n") + 1 :]
        lines = _lines(data[: len(data) - len(rest)])
        if not found:
            first = next((at for at, line in enumerate(lines) if b'"' in line), len(lines))
            lines = lines[first:]
        found += lines
        if len(found) >= _SAMPLE_LINES or seen > _LOOK_AHEAD:
            break
    return found[:_SAMPLE_LINES]


# --- rows -------------------------------------------------------------------------------------------------------------


class _Reader:
    """Batches of a file whose shape is known.

    Args:
        skip: lines of the header; `first` is the number of its first line.
    """

    def __init__(self, path: str, shape: _Shape, skip: int, first: int) -> None:
        self._path, self._shape = path, shape
        self._skip = first - 1 + skip
        self._whole = self._whole_lines()
        self._records = RecordReader(shape.dialect, shape.width, shape.url, shape.sloppy)
        self._line = 1
        self._pulled = 0

    def batches(self) -> Iterator[RawBatch]:
        for block in self._whole:
            skipped = 0
            while self._skip and skipped < len(block):
                skipped = block.index(b"\n", skipped) + 1
                self._skip, self._line = self._skip - 1, self._line + 1
            block = block[skipped:] if skipped else block
            if not block:
                continue
            quick = self._quick(block)
            if quick is None:
                yield from self._strict(block)
                continue
            self._line += block.count(b"\n")
            if len(quick):
                yield quick

    def _whole_lines(self) -> Iterator[bytes]:
        """Blocks that end with a line; a line that is too long becomes one that no record can be."""
        rest = b""
        for block in blocks_of(self._path, _BLOCK):
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block if len(rest) < row_limits.MAX_LINE else b""
                continue
            yield rest + block[:end]
            rest = block[end:]
        if rest:
            yield rest + b"\n"

    def _quick(self, block: bytes) -> RawBatch | None:
        """Return the rows of a block by pyarrow, where that is sure to give what the strict reader would; else None."""
        shape = self._shape
        if not _is_plain(block, shape.dialect):
            return None
        strange: list[object] = []

        def note(row: object) -> str:
            strange.append(row)
            return "skip"

        names = [str(at) for at in range(shape.width)]
        wanted = [str(shape.caption)] if shape.url is None else [str(shape.caption), str(shape.url)]
        try:
            table = pyarrow.csv.read_csv(
                pa.BufferReader(block),
                pyarrow.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
                pyarrow.csv.ParseOptions(
                    delimiter=shape.dialect.separator.decode(),
                    quote_char=False if shape.dialect.quoting == "none" else '"',
                    invalid_row_handler=note,
                ),
                pyarrow.csv.ConvertOptions(
                    include_columns=wanted, column_types=dict.fromkeys(wanted, pa.binary()), strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid:
            return None
        if strange:
            return None  # a row of another width, whose place pyarrow does not say
        captions = table.column(0).combine_chunks().cast(pa.large_binary())
        urls = None if shape.url is None else table.column(1).combine_chunks().cast(pa.large_binary())
        return RawBatch(captions, urls)

    def _strict(self, block: bytes) -> Iterator[RawBatch]:
        builder = Builder()
        lines = _lines(block)
        for record in self._records.read(lines, self._line, self._more):
            self._add(builder, record)
            if builder.full:
                yield builder.take()
        self._line += len(lines)
        if builder:
            yield builder.take()

    def _more(self) -> list[bytes]:
        return _lines(next(self._whole, b""))

    def _add(self, builder: Builder, record: Record) -> None:
        shape, line = self._shape, f"line {record.line}"
        fields = record.fields
        if record.problem:
            builder.reject(Bad(Reason.ROW_MALFORMED, f"{line}: {record.problem}"))
        elif any(len(field) >= row_limits.MAX_LINE for field in fields):
            builder.reject(Bad(Reason.ROW_MALFORMED, f"{line}: {row_limits.too_long().message}"))
        elif not fits(fields, shape.width):
            what = (
                f"{len(fields)} fields, the header has {shape.width}: a separator, quote or line break is not escaped"
            )
            builder.reject(Bad(Reason.ROW_MALFORMED, f"{line}: {what}"))
        else:
            builder.add(fields[shape.caption], None if shape.url is None else fields[shape.url])


def _is_plain(block: bytes, dialect: Dialect) -> bool:
    """Whether pyarrow reads a block as the strict reader does: every quote where it belongs, no line break in a field.

    Quotes are taken in turn as opening and closing ones. An opening one follows a separator, a line break or, as the
    second of a doubled one, a quote; a closing one is followed by one of these.
    """
    if len(block) > _BLOCK * 2 or (b"\r" in block and block.count(b"\r") != block.count(b"\r\n")):
        return False
    if dialect.quoting == "none" or b'"' not in block:
        return True
    if dialect.quoting == "backslash" and (b"\\" in block or b'""' in block):
        return False
    bytes_N = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(bytes_N == ord('"'))
    if len(quotes) % 2:
        return False
    opening, closing = quotes[0::2], quotes[1::2]
    allowed = np.zeros(256, bool)
    allowed[[dialect.separator[0], ord("\n"), ord("\r"), ord('"')]] = True
    before = bytes_N[opening[1:] - 1] if opening[0] == 0 else bytes_N[opening - 1]
    # The block ends with a line break, so that every quote has a byte behind it.
    if not (allowed[before].all() and allowed[bytes_N[closing + 1]].all()):
        return False
    breaks = np.flatnonzero(bytes_N == ord("\n"))
    return bool((np.searchsorted(breaks, opening) == np.searchsorted(breaks, closing)).all())
