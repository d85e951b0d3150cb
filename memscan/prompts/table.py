"""Prompts: every caption of the input normalised, folded with its duplicates, and counted.

A caption is what a person would see: HTML entities are unescaped, Unicode is in its composed form, and runs of white
space and control characters are one space. Captions that are equal then are one prompt. A row that holds no usable
caption becomes a rejected row with its reason, so the counts of the table always add up to the rows that were read.
"""

from __future__ import annotations

import hashlib
import html
import html.entities
import os
import re
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan.config import PromptsConfig
from memscan.errors import InputError, Reason
from memscan.io import storage
from memscan.prompts.files import SUFFIXES, Columns, RawRow, open_prompt_file
from memscan.records import PROMPTS, Status, prompt_id

_CHUNK_ROWS = 65_536
_EXCERPT = 80

# Control characters (Unicode category Cc) and a byte order mark that was pasted into the middle of a file.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufeff]")

# A name without its semicolon is an entity only where neither a letter, a digit nor "=" follows: HTML's rule for
# attributes, from which captions come. Else "R&Bands" or "?a=1&copy=2" would be mangled.
_BARE_NAMES = "|".join(sorted((n for n in html.entities.html5 if not n.endswith(";")), key=len, reverse=True))
_ENTITY = re.compile(
    rf"&(?:#[0-9]+(?:;|(?![0-9]))|#[xX][0-9a-fA-F]+(?:;|(?![0-9a-fA-F]))|[A-Za-z][A-Za-z0-9]*;|(?:{_BARE_NAMES})(?![A-Za-z0-9=]))"
)
# "&amp;amp;amp;lt;" is folded at once: level by level it would take time quadratic in its length.
_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP)(?:;|(?![A-Za-z0-9=]))|#0*38(?:;|(?![0-9]))|#[xX]0*26(?:;|(?![0-9a-fA-F])))+")


def normalise(text: str) -> str:
    """The canonical form of a caption; applying it again changes nothing.

    HTML entities are unescaped however often they were escaped, Unicode is brought to NFC, control characters and runs
    of white space become one space, and the ends are stripped.
    """
    while True:
        before = text
        if "&" in text:
            text = _ENTITY.sub(_unescape, _AMPERSANDS.sub("&", text))
        text = " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())
        if text == before or "&" not in text:
            return text


def _unescape(match: re.Match[str]) -> str:
    entity = match.group()
    if entity[1] != "#" and entity[1:] not in html.entities.html5:
        return entity  # html.unescape would take "&notit;" for "&not" followed by "it;"
    return html.unescape(entity)


@dataclass(frozen=True)
class PromptSource:
    """What one input file gave."""

    path: str
    rows: int
    rejected: int
    caption_column: str | None
    separator: str | None


@dataclass(frozen=True)
class PromptTable:
    """The prompts of a census: `sum(table["count"]) == rows_read`.

    Attributes:
        table: `records.PROMPTS`, in the order of first appearance; `url` is the first that any duplicate had.
        rows_read: input rows, good and bad.
        sources: the files they came from, in the order of reading.
    """

    table: pa.Table
    rows_read: int
    sources: tuple[PromptSource, ...]


def read_prompts(config: PromptsConfig) -> PromptTable:
    """Read CSV, TSV, JSON Lines, text and Parquet files, or folders of them, into one table of distinct prompts.

    With `limit`, reading stops at the row that brings the last prompt allowed; later rows are not counted.

    Raises:
        InputError: a path is missing, empty or of an unknown kind, a file lacks the caption column, or there is no row.
    """
    fold = _Fold(config.max_chars, config.limit)
    columns = Columns(config.caption_column, config.url_column)
    sources: list[PromptSource] = []
    for path, named in _expand(config.paths):
        opened = open_prompt_file(path, columns)
        rows, rejected = fold.add(path, opened.rows)
        if rows == 0 and named:
            raise InputError("is empty: it has no rows", where=path)
        sources.append(PromptSource(path, rows, rejected, opened.caption_column, opened.separator))
        if fold.full:
            break
    if fold.rows_read == 0:
        raise InputError("no prompts", where=", ".join(config.paths))
    return PromptTable(fold.table(), fold.rows_read, tuple(sources))


def _expand(paths: Iterable[str]) -> Iterable[tuple[str, bool]]:
    """Every file once, and whether it was named itself: an empty file is no mistake in a folder, as jobs write them."""
    seen: set[str] = set()
    for path in paths:
        is_folder = storage.is_dir(path)
        if not is_folder and not storage.exists(path):
            raise InputError("no such file or folder", where=path)
        files = storage.list_files(path, SUFFIXES) if is_folder else [path]
        if not files:
            raise InputError("no prompt files in this folder", where=path, hint=f"known endings: {', '.join(SUFFIXES)}")
        for file in files:
            identity = file if storage.is_remote(file) else os.path.realpath(file)
            if identity not in seen:
                seen.add(identity)
                yield file, not is_folder


class _Fold:
    """Collects rows into Arrow chunks; only an index entry and a count stay in memory as Python values for a prompt."""

    def __init__(self, max_chars: int, limit: int | None) -> None:
        self.rows_read = 0
        self.full = False
        self._max_chars = max_chars
        self._limit = limit
        self._index: dict[int, int] = {}
        self._counts = array("q")
        self._has_url = bytearray()
        self._late_urls: dict[int, str] = {}
        self._batches: list[pa.RecordBatch] = []
        self._pending: list[tuple[str, str, str, int, str | None, str, str | None, str | None]] = []

    def add(self, source: str, rows: Iterable[RawRow]) -> tuple[int, int]:
        """Take rows until there are none or the limit is reached; returns how many were taken and rejected."""
        source = _encodable(source)
        number = rejected = 0
        for number, raw in enumerate(rows, start=1):
            self.rows_read += 1
            url = _clean_url(raw.url)
            caption, reason, message = self._judge(raw)
            if reason is None:
                self._add_prompt(caption, url, source, number)
            else:
                rejected += 1
                self._append(_reject_id(source, number), "", url, source, number, reason, message)
            if self.full:
                break
        return number, rejected

    def table(self) -> pa.Table:
        """The prompts so far, as `records.PROMPTS`."""
        self._flush()
        table = pa.Table.from_batches(self._batches, schema=_WITHOUT_COUNT)
        columns = {name: table[name] for name in table.column_names}
        columns["count"] = pa.array(np.array(self._counts, dtype=np.int64))
        if self._late_urls:
            mask = np.zeros(len(table), dtype=bool)
            mask[list(self._late_urls)] = True
            late = pa.array([url for _, url in sorted(self._late_urls.items())], pa.string())
            columns["url"] = pc.replace_with_mask(table["url"], mask, late)
        return pa.Table.from_arrays([columns[name] for name in PROMPTS.names], schema=PROMPTS)

    def _judge(self, raw: RawRow) -> tuple[str, Reason | None, str | None]:
        if raw.reason is not None or raw.caption is None:
            return "", raw.reason or Reason.ROW_MALFORMED, raw.message
        text = raw.caption
        if not text.isascii() and not _is_encodable(text):
            return "", Reason.CAPTION_NOT_UTF8, "bytes that are not UTF-8"
        # An escaped character takes up to a dozen; what is longer by far is not worth the work of normalising it.
        caption = normalise(text) if len(text) <= 12 * self._max_chars else text
        if not caption:
            return "", Reason.CAPTION_EMPTY, "no visible character"
        if len(caption) > self._max_chars:
            start = normalise(caption[:_EXCERPT])
            return "", Reason.CAPTION_TOO_LONG, f"{len(caption)} characters, at most {self._max_chars}: {start!r}..."
        return caption, None, None

    def _add_prompt(self, caption: str, url: str | None, source: str, number: int) -> None:
        identity = prompt_id(caption)
        key = int(identity, 16)  # a third of the memory of its text
        position = self._index.get(key)
        if position is None:
            self._index[key] = len(self._counts)
            self._append(identity, caption, url, source, number, None, None)
            self.full = self._limit is not None and len(self._index) >= self._limit
            return
        self._counts[position] += 1
        if url is not None and not self._has_url[position]:
            self._has_url[position] = 1
            self._late_urls[position] = url

    def _append(
        self, key: str, caption: str, url: str | None, source: str, row: int, reason: Reason | None, message: str | None
    ) -> None:
        status = Status.DONE if reason is None else Status.REJECTED
        code = None if reason is None else reason.value
        self._pending.append((key, caption, source, row, url, status.value, code, message))
        self._counts.append(1)
        self._has_url.append(url is not None)
        if len(self._pending) >= _CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            columns = zip(*self._pending, strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, _WITHOUT_COUNT, strict=True)]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=_WITHOUT_COUNT))
            self._pending.clear()


_WITHOUT_COUNT = pa.schema([field for field in PROMPTS if field.name != "count"])


def _reject_id(source: str, row: int) -> str:
    # Line feeds never stand in a normalised caption, so no prompt has this id.
    return hashlib.blake2b(f"rejected\n{source}\n{row}".encode(), digest_size=8).hexdigest()


def _clean_url(url: str | None) -> str | None:
    return _encodable(url.strip()) or None if url else None


def _encodable(text: str) -> str:
    """The text with bytes that were not UTF-8 (lone surrogates) written as escapes, so that nothing of it is lost."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_encodable(text: str) -> bool:
    return text == _encodable(text)
