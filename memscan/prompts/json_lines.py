"""This module reads prompt files of JSON Lines: each line has one object, and blank lines are no rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from memscan.errors import InputError, Reason
from memscan.prompts.rows import Bad, Builder, Chosen, Columns, OpenedFile, RawBatch, choose_columns, not_utf8, too_long
from memscan.prompts.text import lines_of, refuse_utf16

_SAMPLE = 100


def open_json_lines(path: str, columns: Columns) -> OpenedFile:
    """Open a file of JSON Lines. Raises InputError if no line of the first hundred is an object with a caption."""
    refuse_utf16(path)
    sample = list(itertools.islice(_records(path), _SAMPLE))
    if not sample:
        return OpenedFile(iter(()), "JSON Lines")
    if all(isinstance(record, str) for record in sample):
        return OpenedFile(_strings(path), "JSON Lines of strings")
    if not any(isinstance(record, dict) for record in sample):
        raise InputError("no line is a JSON object", where=path, hint="JSON Lines has one object in each line")
    return open_records(sample, _records(path), columns, path, "JSON Lines")


def open_records(sample: Iterable[Any], records: Iterable[Any], columns: Columns, path: str, name: str) -> OpenedFile:
    """Return a file of objects, of which `sample` was examined already. Raises InputError if it has no caption."""
    names = list(dict.fromkeys(key for record in sample if isinstance(record, dict) for key in record))
    chosen = choose_columns(names, columns, path)
    several = any(isinstance(record, dict) and isinstance(record.get(names[chosen.caption]), list) for record in sample)
    url = None if chosen.url is None else names[chosen.url]
    batches = _batches(records, names, chosen)
    return OpenedFile(batches, name, names[chosen.caption], url, chosen.kin, several=several)


def _batches(records: Iterable[Any], names: list[str], chosen: Chosen) -> Iterator[RawBatch]:
    caption, url = names[chosen.caption], None if chosen.url is None else names[chosen.url]
    builder = Builder()
    for record in records:
        add_record(builder, record, caption, url)
        if builder.full:
            yield builder.take()
    if builder:
        yield builder.take()


def add_record(builder: Builder, record: Any, caption: str, url: str | None) -> None:
    """Add the captions of an object, or a reason; each of a list of captions is a row."""
    if isinstance(record, Bad):
        builder.reject(record)
        return
    if not isinstance(record, dict):
        builder.reject(Bad(Reason.ROW_MALFORMED, f"a JSON {type(record).__name__}, not an object"))
        return
    link = record.get(url) if url is not None else None
    link = link if isinstance(link, str) else None
    if caption not in record:
        builder.reject(Bad(Reason.ROW_MALFORMED, f"no key {caption!r}"), link)
        return
    value = record[caption]
    for one in value if isinstance(value, list) and value else [value]:
        if one is None or isinstance(one, str):
            builder.add(one or "", link)
        else:
            kind = "an empty list" if one == [] else f"a {type(one).__name__}"
            builder.reject(Bad(Reason.ROW_MALFORMED, f"the caption is {kind}, not text"), link)


def _strings(path: str) -> Iterator[RawBatch]:
    builder = Builder()
    for record in _records(path):
        if isinstance(record, str):
            builder.add(record)
        else:
            why = Bad(Reason.ROW_MALFORMED, f"a JSON {type(record).__name__}, not a string")
            builder.reject(record if isinstance(record, Bad) else why)
        if builder.full:
            yield builder.take()
    if builder:
        yield builder.take()


def _records(path: str) -> Iterator[Any]:
    for number, line in enumerate(lines_of(path), start=1):
        if line is None or line.strip():
            yield _parsed(line, number)


def _parsed(line: bytes | None, number: int) -> Any:
    if line is None:
        return Bad(too_long().reason, f"line {number}: {too_long().message}")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Bad(Reason.CAPTION_NOT_UTF8, f"line {number}: {not_utf8(line)}")
    except (ValueError, RecursionError) as error:
        return Bad(Reason.ROW_MALFORMED, f"line {number}: not JSON: {error}")
