"""This module defines what readers of prompt files give: batches of rows, each a caption or a reason why there is none.

Readers never drop a row and never guess at a broken one. Only what makes the whole file useless (missing, a wrong
column, not this format) is an `InputError`. Files are read as streams; nothing here grows with their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from memscan.errors import InputError, Reason

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
BATCH_ROWS = 16_384
MAX_LINE = 4 << 20  # bytes of one line; no caption has as many, but a binary file's lines may


class Bad(NamedTuple):
    """This says why a row has no caption."""

    reason: Reason
    message: str


class RawRow(NamedTuple):
    """This is one row as it is in a file: either a caption or a reason why there is none."""

    caption: str | None
    url: str | None = None
    reason: Reason | None = None
    message: str | None = None


@dataclass(frozen=True)
class RawBatch:
    """These are rows of a file, in its order.

    Args:
        captions: large_binary; null is an empty caption, or one of `bad`.
        urls: large_binary of the same length; None if no row has one.
        bad: rows that hold no caption, by their place in the batch.
    """

    captions: pa.Array
    urls: pa.Array | None = None
    bad: Mapping[int, Bad] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def slice(self, rows: int) -> RawBatch:
        """Return this number of first rows."""
        bad = {at: why for at, why in self.bad.items() if at < rows}
        return RawBatch(self.captions.slice(0, rows), None if self.urls is None else self.urls.slice(0, rows), bad)


@dataclass(frozen=True)
class Columns:
    """These are the user's settings for the columns: a name, a number from 1 on, or None.

    None means that the column is found by its usual names.

    Args:
        header: whether the first line of a CSV names its columns.
    """

    caption: str | int | None = None
    url: str | int | None = None
    header: bool = True


@dataclass(frozen=True)
class OpenedFile:
    """This is a prompt file whose beginning has been understood, and the batches that follow.

    Attributes:
        format: a word, such as "CSV".
        caption_column, url_column: their names, or "column N".
        kin: further columns with a usual name of a caption, which were not chosen.
        separator, quoting: of a CSV; quoting is "doubled", "backslash" or "none".
        several: whether a row may hold several captions; each counts as a row then.
    """

    batches: Iterator[RawBatch]
    format: str
    caption_column: str | None = None
    url_column: str | None = None
    kin: tuple[str, ...] = ()
    separator: str | None = None
    quoting: str | None = None
    several: bool = False

    @property
    def rows(self) -> Iterator[RawRow]:
        """Yield the same row by row; bytes that are not UTF-8 are a reason."""
        for batch in self.batches:
            urls = [None] * len(batch) if batch.urls is None else batch.urls.to_pylist()
            for at, (caption, url) in enumerate(zip(batch.captions.to_pylist(), urls, strict=True)):
                link = None if url is None else url.decode("utf-8", "backslashreplace")
                if why := batch.bad.get(at):
                    yield RawRow(None, link, why.reason, why.message)
                elif (text := decoded(caption or b"")) is None:
                    yield RawRow(None, link, Reason.CAPTION_NOT_UTF8, not_utf8(caption))
                else:
                    yield RawRow(text, link)


def decoded(data: bytes) -> str | None:
    """Return the text of UTF-8, or None if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def not_utf8(data: bytes) -> str:
    """Describe what is wrong with bytes that are not UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte 0x{data[error.start]:02x} at {error.start}: {error.reason}"
    return "bytes that are not UTF-8"


class Builder:
    """This collects rows into batches."""

    def __init__(self) -> None:
        self._captions: list[bytes | None] = []
        self._urls: list[bytes | None] = []
        self._bad: dict[int, Bad] = {}

    def __len__(self) -> int:
        return len(self._captions)

    @property
    def full(self) -> bool:
        return len(self._captions) >= BATCH_ROWS

    def add(self, caption: bytes | str, url: bytes | str | None = None) -> None:
        """Add a caption as bytes, or as text, whose unpaired surrogates make it a bad row."""
        if isinstance(caption, str):
            try:
                caption = caption.encode("utf-8")
            except UnicodeEncodeError as error:
                message = f"half a surrogate pair, {caption[error.start]!r}, at character {error.start}"
                self.reject(Bad(Reason.CAPTION_NOT_UTF8, message), url)
                return
        self._captions.append(caption)
        self._urls.append(_url(url))

    def reject(self, why: Bad, url: bytes | str | None = None) -> None:
        """Add a row without a caption."""
        self._bad[len(self._captions)] = why
        self._captions.append(None)
        self._urls.append(_url(url))

    def take(self) -> RawBatch:
        """Return what was added since the last call."""
        captions = pa.array(self._captions, pa.large_binary())
        urls = pa.array(self._urls, pa.large_binary()) if any(self._urls) else None
        batch = RawBatch(captions, urls, self._bad)
        self._captions, self._urls, self._bad = [], [], {}
        return batch


def _url(url: bytes | str | None) -> bytes | None:
    return url.encode("utf-8", "backslashreplace") if isinstance(url, str) else url


def find_column(names: Sequence[str], wanted: str | int | None, usual: Sequence[str]) -> int | None:
    """Place of the column called `wanted` (or with this number, from 1 on), else of the first of the usual names.

    Case counts only between equals.
    """
    if isinstance(wanted, int):
        return wanted - 1 if 1 <= wanted <= len(names) else None
    plain = [name.strip() for name in names]
    folded = [name.lower() for name in plain]
    for candidate in (wanted.strip(),) if wanted is not None else usual:
        if candidate in plain:
            return plain.index(candidate)
        if candidate.lower() in folded:
            return folded.index(candidate.lower())
    return None


@dataclass(frozen=True)
class Chosen:
    """These are the places of the columns, counted from 0, and the names of columns that might have been chosen too."""

    caption: int
    url: int | None
    kin: tuple[str, ...]


def choose_columns(names: Sequence[str], columns: Columns, path: str) -> Chosen:
    """Choose the columns of caption and URL.

    Raises:
        InputError: there is none, or two have the name.
    """
    caption = find_column(names, columns.caption, CAPTION_NAMES)
    if caption is None:
        raise _no_column(columns.caption, "caption", names, path)
    _check_once(names, caption, columns.caption, "caption", path)
    url = find_column(names, columns.url, URL_NAMES)
    if url is None and columns.url is not None:
        raise _no_column(columns.url, "url", names, path)
    if url is not None:
        _check_once(names, url, columns.url, "url", path)
    usual = {name for name in CAPTION_NAMES if columns.caption is None}
    kin = tuple(name for at, name in enumerate(names) if at != caption and name.strip().lower() in usual)
    return Chosen(caption, url, kin)


def _check_once(names: Sequence[str], at: int, wanted: str | int | None, role: str, path: str) -> None:
    name = names[at].strip()
    if not isinstance(wanted, int) and [other.strip() for other in names].count(name) > 1:
        what = f"{[other.strip() for other in names].count(name)} columns are called {name!r}"
        raise InputError(what, where=path, hint=f"give the number of the right one as prompts.{role}_column, from 1 on")


def _no_column(wanted: str | int | None, role: str, names: Sequence[str], path: str) -> InputError:
    shown = ", ".join(repr(name[:60]) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    if isinstance(wanted, int):
        what = f"no column {wanted}, of {len(names)}"
    else:
        what = f"no column {wanted!r}" if wanted is not None else f"no column with a usual name of a {role}"
    return InputError(
        f"{what} (columns: {shown})",
        where=path,
        hint=f"set prompts.{role}_column; for a CSV whose first line is data, prompts.header: false and a number",
    )


def byte_lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield lines without their ends; None for a line of at least `MAX_LINE` bytes."""
    rest: list[bytes] = []
    held = 0
    for block in blocks:
        first, *lines = block.split(b"\n")
        rest.append(first if held < MAX_LINE else b"")
        held += len(first)
        if not lines:
            continue
        yield b"".join(rest).rstrip(b"\r") if held < MAX_LINE else None
        for line in lines[:-1]:
            yield line.rstrip(b"\r") if len(line) < MAX_LINE else None
        rest, held = [lines[-1]], len(lines[-1])
    if held:
        yield b"".join(rest).rstrip(b"\r") if held < MAX_LINE else None


def too_long() -> Bad:
    """Describe a line that no caption can be."""
    return Bad(Reason.ROW_MALFORMED, f"a line of more than {MAX_LINE} bytes")
