"""This module reads captions and addresses of image files.

They are in a text file, a JSON file, or a table of the folder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.errors import InputError
from memscan.io import storage
from memscan.sources.layouts import JSON, TEXT, Layout
from memscan.sources.tables import COLUMN_NAMES

MAX_TEXT = 1 << 20  # bytes of a caption or of metadata; the rest is not read


class Described(NamedTuple):
    """These are the caption and the metadata of an image."""

    caption: str | None = None
    url: str | None = None


class CaptionReader:
    """This finds captions and metadata of the image files of a source; tables of folders are read once."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._tables = {file.rpartition("/")[0]: file for file in layout.metadata}
        self._read: dict[str, dict[str, Described]] = {}

    def of(self, at: int) -> Described:
        """Return caption and metadata of the source's file at this place.

        Raises InputError if a folder's table cannot be read.
        """
        file = self._layout.files[at]
        beside = self._layout.captions[at] if self._layout.captions else 0
        stem = file[: -len(PurePosixPath(file).suffix)] if PurePosixPath(file).suffix else file
        found = self._in_tables(file)
        if beside & JSON:
            facts = facts_of(_content(stem, ".json"))
            found = Described(_text(facts.get("caption")) or found.caption, _text(facts.get("url")) or found.url)
        if beside & TEXT:
            found = Described(caption_of(_content(stem, ".txt")), found.url)
        return found

    def _in_tables(self, file: str) -> Described:
        folder = file.rpartition("/")[0]
        while self._tables:
            if folder in self._tables:
                if folder not in self._read:
                    self._read[folder] = _read_table(self._tables[folder])
                found = self._read[folder].get(file.removeprefix(f"{folder}/"))
                if found is not None:
                    return found
            if "/" not in folder or len(folder) < len(self._layout.root.rstrip("/")):
                break
            folder = folder.rpartition("/")[0]
        return Described()


class Absent(NamedTuple):
    """This is an image that metadata of a folder describe, and that is not there."""

    name: str
    metadata: str
    described: Described


def absent_images(layout: Layout) -> tuple[Absent, ...]:
    """Return rows of the folders' metadata whose file is missing; names are paths below the root.

    Raises:
        InputError: a table cannot be read.
    """
    known = {*layout.files, *(entry.path for entry in layout.not_taken)} if layout.metadata else set()
    found = []
    for table in layout.metadata:
        folder = table.rpartition("/")[0]
        for name, described in _read_table(table).items():
            file = f"{folder}/{name}"
            if file not in known and not (storage.is_inner(name) and storage.exists(file)):
                found.append(Absent(layout.name(file), layout.name(table), described))
    return tuple(found)


def facts_of(data: bytes | None) -> dict[str, Any]:
    """Return the object in a JSON file.

    It is empty if there is none, because the image counts and its metadata are optional.
    """
    try:
        found = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def caption_of(data: bytes | None) -> str | None:
    """Return the text of a caption file in one line."""
    return None if data is None else " ".join(data.decode("utf-8", "replace").split())


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _content(stem: str, ending: str) -> bytes | None:
    for file in (f"{stem}{ending}", f"{stem}{ending.upper()}"):
        try:
            with storage.open_input(file) as opened:
                return opened.read(MAX_TEXT)
        except InputError:
            continue
    return None


def _read_table(file: str) -> dict[str, Described]:
    """File name -> what is said of it, as Hugging Face's imagefolder has it (metadata.jsonl, .csv or .parquet)."""
    try:
        rows = _READERS[file.rpartition(".")[2].lower()](file)
        names = {key.lower(): key for row in rows[:100] for key in row}
    except (ValueError, RecursionError, csv.Error, pa.ArrowException, OSError, AttributeError) as error:
        raise InputError(f"cannot be read ({error})", where=file, hint="correct it, or remove it") from error
    key = names.get("file_name") or names.get("image_file_name") or names.get("file") or names.get("path")
    if key is None:
        raise InputError(
            f"has no file_name (its columns: {', '.join(names.values())})",
            where=file,
            hint="imagefolder's metadata have one",
        )
    caption, url = (
        next((names[name] for name in COLUMN_NAMES[ours] if name in names), None) for ours in ("caption", "url")
    )
    found = {}
    for row in rows:
        if isinstance(row.get(key), str):
            text, link = (row.get(column) if column else None for column in (caption, url))
            found[str(row[key]).removeprefix("./")] = Described(_text(text), _text(link))
    return found


def _json_lines(file: str) -> list[dict[str, Any]]:
    lines = storage.read_bytes(file).decode("utf-8-sig").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _csv(file: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(storage.read_bytes(file).decode("utf-8-sig"), newline="")))


def _parquet(file: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(storage.read_bytes(file))).to_pylist()
    return rows


_READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {"jsonl": _json_lines, "csv": _csv, "parquet": _parquet}
