"""The formats of prompt files: each reader turns one file into a stream of `RawRow`, one for every row it holds.

Readers never drop a row and never guess at a broken one: what cannot be read is a `RawRow` with a reason. Only what
makes the whole file useless (missing, wrong column, not this format) is an `InputError`. Files are read as streams;
nothing here grows with their size.

Blank lines are not rows in CSV and JSON Lines; in a text file, where a line is a caption, one is an empty caption.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.errors import InputError, Reason
from memscan.io import storage

CAPTION_NAMES = (
    "caption",
    "text",
    "prompt",
    "top_caption",
    "captions",
    "prompts",
    "title",
    "description",
    "alt_text",
    "alt",
)
URL_NAMES = ("url", "image_url", "top_url", "img_url", "uri", "link")

MAX_LINE = 4 << 20  # bytes or characters of one line; no caption has as many, but a binary file's lines may
_MAX_RECORD = 1 << 20  # characters of one CSV record: past it, an opening quote is taken as never closed
_SEPARATORS = (",", ";", "\t", "|")
_NO_SEPARATOR = "\x1f"
_SAMPLE = 100


class RawRow(NamedTuple):
    """One row as it stands in a file; either a caption or a reason why there is none."""

    caption: str | None
    url: str | None = None
    reason: Reason | None = None
    message: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns that the user asked for; `None` where they are to be found by their usual names."""

    caption: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class OpenedFile:
    """A prompt file whose header has been understood, and the rows that follow."""

    rows: Iterator[RawRow]
    caption_column: str | None = None
    separator: str | None = None


def open_prompt_file(path: str, columns: Columns) -> OpenedFile:
    """Open a prompt file by the ending of its name.

    Raises:
        InputError: unknown ending, unreadable, not what its ending says, or without the caption column. Reading the
            rows may raise it too, where a file breaks off in the middle.
    """
    for ending, reader in _READERS.items():
        if path.lower().endswith(ending):
            return reader(path, columns)
    raise InputError("unknown kind of prompt file", where=path, hint=f"known endings: {', '.join(SUFFIXES)}")


def find_column(names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The column called `wanted`, else the first of the usual names that there is; case counts only between equals."""
    folded = [name.strip().lower() for name in names]
    for candidate in (wanted,) if wanted is not None else usual:
        if candidate in names:
            return candidate
        if candidate.strip().lower() in folded:
            return names[folded.index(candidate.strip().lower())]
    return None


def _require_columns(names: Sequence[str], columns: Columns, path: str) -> tuple[str, str | None]:
    caption = find_column(names, columns.caption, CAPTION_NAMES)
    if caption is None:
        raise _no_column(columns.caption, "caption", names, path)
    url = find_column(names, columns.url, URL_NAMES)
    if url is None and columns.url is not None:
        raise _no_column(columns.url, "url", names, path)
    return caption, url


def _no_column(wanted: str | None, role: str, names: Sequence[str], path: str) -> InputError:
    shown = ", ".join(repr(name[:60]) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    what = f"no column {wanted!r}" if wanted is not None else f"no column with a usual name of a {role}"
    return InputError(f"{what} (columns: {shown})", where=path, hint=f"set prompts.{role}_column")


# --- lines ------------------------------------------------------------------------------------------------------------


def _byte_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends or a byte order mark; None for one longer than MAX_LINE."""
    first = True
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield (line.removeprefix(b"\xef\xbb\xbf") if first else line).rstrip(b"\r\n")
        first = False


def _refuse_utf16(path: str) -> None:
    with storage.open_input(path) as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError("is UTF-16", where=path, hint="convert it: iconv -f UTF-16 -t UTF-8")


def _too_long_line() -> RawRow:
    return RawRow(None, None, Reason.ROW_MALFORMED, f"a line of more than {MAX_LINE} bytes")


def _decode_line(line: bytes) -> str | RawRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RawRow(
            None, None, Reason.CAPTION_NOT_UTF8, f"byte 0x{line[error.start]:02x} at {error.start}: {error.reason}"
        )


def _open_text(path: str, columns: Columns) -> OpenedFile:
    _refuse_utf16(path)

    def rows() -> Iterator[RawRow]:
        with storage.open_input(path) as file:
            for line in _byte_lines(file):
                text = _too_long_line() if line is None else _decode_line(line)
                yield text if isinstance(text, RawRow) else RawRow(text)

    return OpenedFile(rows())


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def _open_jsonl(path: str, columns: Columns) -> OpenedFile:
    _refuse_utf16(path)
    names: dict[str, None] = {}
    record: dict[str, Any] | RawRow | None = None
    for record in itertools.islice(_json_lines(path), _SAMPLE):
        if isinstance(record, dict):
            names.update(dict.fromkeys(record))
    if record is None:
        return OpenedFile(iter(()))
    if not names:
        raise InputError("no line is a JSON object", where=path, hint="JSON Lines has one object in each line")
    caption, url = _require_columns(list(names), columns, path)
    rows = (record if isinstance(record, RawRow) else _json_row(record, caption, url) for record in _json_lines(path))
    return OpenedFile(rows, caption)


def _json_lines(path: str) -> Iterator[dict[str, Any] | RawRow]:
    with storage.open_input(path) as file:
        for line in _byte_lines(file):
            if line is None or line.strip():
                yield _json_object(line)


def _json_object(line: bytes | None) -> dict[str, Any] | RawRow:
    text = _too_long_line() if line is None else _decode_line(line)
    if isinstance(text, RawRow):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RawRow(None, None, Reason.ROW_MALFORMED, f"not JSON: {error}")
    if not isinstance(value, dict):
        return RawRow(None, None, Reason.ROW_MALFORMED, f"a JSON {type(value).__name__}, not an object")
    return value


def _json_row(record: dict[str, Any], caption: str, url: str | None) -> RawRow:
    link = record.get(url) if url is not None else None
    link = link if isinstance(link, str) else None
    if caption not in record:
        return RawRow(None, link, Reason.ROW_MALFORMED, f"no key {caption!r}")
    value = record[caption]
    if value is None or isinstance(value, str):
        return RawRow(value or "", link)
    return RawRow(None, link, Reason.ROW_MALFORMED, f"the caption is a {type(value).__name__}, not text")


# --- CSV --------------------------------------------------------------------------------------------------------------


def _open_csv(path: str, columns: Columns) -> OpenedFile:
    _refuse_utf16(path)
    csv.field_size_limit(
        max(csv.field_size_limit(), 2 * MAX_LINE)
    )  # the default refuses captions of 131,072 characters
    separator = _sniff_separator(path, columns)
    records = _csv_records(_text_lines(path), separator)
    header = next(records, None)
    if header is None:
        return OpenedFile(iter(()))
    if isinstance(header, RawRow):
        raise InputError(f"the header cannot be read: {header.message}", where=path)
    names = [name.strip() for name in header]
    caption, url = _require_columns(names, columns, path)
    where = (names.index(caption), names.index(url) if url is not None else None, len(names))
    rows = (record if isinstance(record, RawRow) else _csv_row(record, *where) for record in records)
    return OpenedFile(rows, caption, separator if separator != _NO_SEPARATOR else None)


def _text_lines(path: str) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 become lone surrogates, which later reject their row."""
    with (
        storage.open_input(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        for number in itertools.count(1):
            line = text.readline(MAX_LINE)
            if len(line) == MAX_LINE:
                raise InputError(f"line {number} is longer than {MAX_LINE} characters", where=path, hint="is it a CSV?")
            if not line:
                return
            yield line


def _csv_records(lines: Iterator[str], separator: str) -> Iterator[list[str] | RawRow]:
    """Records of a CSV. A quote that is opened and never closed costs its own line, not the rest of the file."""
    feed = _Feed(lines)
    while True:
        for record in csv.reader(feed.take(), delimiter=separator):
            if feed.ended:  # a record after the last line: the reader gave up with its quote still open
                first = feed.open_lines[0][:200]
                feed.put_back()
                yield RawRow(None, None, Reason.ROW_MALFORMED, f"a quote is opened and never closed: {first!r}")
                break
            feed.open_lines.clear()
            if record:
                yield record
        else:
            return


class _Feed:
    """Lines for a CSV reader, which remembers those of the record that is being read so that they can be put back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.open_lines: list[str] = []
        self.ended = False
        self._lines = lines
        self._waiting: deque[str] = deque()

    def take(self) -> Iterator[str]:
        """Lines until there are none, or until the record that is being read outgrows what a record can be."""
        self.ended = False
        while (line := self._next()) is not None:
            self.open_lines.append(line)
            yield line
            if sum(map(len, self.open_lines)) > _MAX_RECORD:
                break
        self.ended = True

    def put_back(self) -> None:
        """Put all but the first line of the open record back, to be taken again."""
        self._waiting.extendleft(reversed(self.open_lines[1:]))
        self.open_lines.clear()

    def _next(self) -> str | None:
        return self._waiting.popleft() if self._waiting else next(self._lines, None)


def _csv_row(record: list[str], caption: int, url: int | None, width: int) -> RawRow:
    link = record[url] if url is not None and url < len(record) else None
    if len(record) <= caption or any(record[width:]):
        message = f"{len(record)} fields, the header has {width}: a separator or quote is not escaped"
        return RawRow(None, None, Reason.ROW_MALFORMED, message)
    return RawRow(record[caption], link)


def _sniff_separator(path: str, columns: Columns) -> str:
    """The separator under which the header names a caption column, then the one with the most even records."""
    sample: list[str] = []
    for line in _text_lines(path):
        sample.append(line)
        if len(sample) >= _SAMPLE or sum(map(len, sample)) > _MAX_RECORD:
            break
    best, best_score = _NO_SEPARATOR, (False, 0.0, 1)
    for separator in _SEPARATORS:
        records = [record for record in csv.reader(sample, delimiter=separator) if record]
        if not records or len(records[0]) < 2:
            continue
        header = records[0]
        known = find_column([name.strip() for name in header], columns.caption, CAPTION_NAMES) is not None
        even = sum(len(record) == len(header) for record in records) / len(records)
        score = (known, even, len(header))
        if score > best_score:
            best, best_score = separator, score
    return best


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _open_parquet(path: str, columns: Columns) -> OpenedFile:
    filesystem, inner = storage.arrow_filesystem(path)
    if storage.file_size(path) == 0:
        return OpenedFile(iter(()))
    try:
        file = pq.ParquetFile(filesystem.open_input_file(inner))
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is no text
        raise InputError(f"is not a Parquet file ({error})", where=path) from error
    schema = file.schema_arrow
    caption, url = _require_columns(schema.names, columns, path)
    kind = schema.field(caption).type
    if not _is_text(kind):
        raise InputError(f"column {caption!r} is {kind}, not text", where=path, hint="set prompts.caption_column")
    if url is not None and not _is_text(schema.field(url).type):
        url = None
    return OpenedFile(_parquet_rows(file, path, caption, url), caption)


def _parquet_rows(file: pq.ParquetFile, path: str, caption: str, url: str | None) -> Iterator[RawRow]:
    wanted = [caption] if url is None else [caption, url]
    try:
        for batch in file.iter_batches(batch_size=16_384, columns=wanted):
            captions = _as_bytes(batch.column(caption))
            links = _as_bytes(batch.column(url)) if url is not None else itertools.repeat(None, batch.num_rows)
            for value, link in zip(captions, links, strict=True):
                text = _decode_line(value or b"")
                where = None if link is None else link.decode("utf-8", "backslashreplace")
                yield text._replace(url=where) if isinstance(text, RawRow) else RawRow(text, where)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"breaks off or is damaged ({error})", where=path) from error
    finally:
        file.close()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_any = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in is_any)


def _as_bytes(column: pa.Array) -> Iterable[bytes | None]:
    """Bytes and not text: pyarrow would refuse the whole batch for one value that is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


_READERS: dict[str, Callable[[str, Columns], OpenedFile]] = {
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".txt": _open_text,
    ".parquet": _open_parquet,
}
SUFFIXES = tuple(_READERS)
