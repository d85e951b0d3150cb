"""This module records files that are no input, and why.

Up to a hundred files that a listing leaves out are named, and all are counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from memscan.errors import InputError
from memscan.io import storage
from memscan.io.content import HEAD, image_format

MOST_NAMES = 100
_READERS = 16


@dataclass(frozen=True)
class NotTaken:
    """This is a file that is not an input, and why."""

    path: str
    why: str


def shown(entries: Iterable[NotTaken], count: int | None = None) -> dict[str, Any]:
    """Return the list as JSON: the number of files, and the first hundred by name."""
    known = list(entries)
    first = [{"name": printable(entry.path), "why": printable(entry.why)} for entry in known[:MOST_NAMES]]
    return {"count": len(known) if count is None else count, "first": first}


def printable(text: str) -> str:
    """Return a name in which bytes that are no UTF-8 (unpaired surrogates, as Python gives them) stand as escapes."""
    if _is_text(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, out of JSON
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def size_of(file: str) -> int:
    """Return the size of a file in bytes, or -1 where it is not there (a dangling link)."""
    try:
        return storage.file_size(file)
    except InputError:
        return -1


def image_formats(files: list[str]) -> list[str | None]:
    """Return, by file, the format of its image by its first bytes; None for no image, "" if it cannot be read."""

    def look(file: str) -> str | None:
        if not storage.is_remote(file) and not os.path.isfile(file):
            return ""  # a dangling link, or a pipe, which nobody might ever write to
        try:
            with storage.open_input(file) as opened:
                return image_format(opened.read(HEAD))
        except InputError:
            return ""

    if len(files) < 4:
        return [look(file) for file in files]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(look, files))
