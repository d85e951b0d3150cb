"""This module reads prompt files that are one JSON document, in the forms in which people publish captions.

These forms are an array of objects or strings; COCO captions (`annotations` with `caption`, images by id); Karpathy's
splits (`images` with `sentences`); a part of DiffusionDB (file name -> object with the prompt in `p`); an object of
captions by name or of lists by column, as pandas writes one; records below `data` or `rows`. A `.json` file with an
object on each line is read as JSON Lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from memscan.errors import InputError, Reason
from memscan.io.compressed import open_stream
from memscan.prompts.json_lines import open_json_lines, open_records
from memscan.prompts.rows import Bad, Builder, Columns, OpenedFile, RawBatch
from memscan.prompts.text import refuse_utf16

MAX_BYTES = 2 << 30  # COCO's largest file has 0.1 GB; parsed, a document takes several times its size
_SAMPLE = 100
_BELOW = ("data", "rows", "records", "items", "examples", "prompts", "captions")


class NoCaptions(InputError):
    """This is a JSON document that holds no captions in any known form: in a folder, it is not a prompt file."""


def open_json(path: str, columns: Columns) -> OpenedFile:
    """Open a `.json` file.

    Raises:
        NoCaptions: it is JSON, but holds no captions in a known form.
        InputError: it is not JSON, or its objects have no caption.
    """
    refuse_utf16(path)
    with open_stream(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        what = f"a JSON document of more than {MAX_BYTES} bytes"
        raise InputError(what, where=path, hint="convert it to JSON Lines, an object on each line")
    if not data.strip():
        return OpenedFile(iter(()), "JSON")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        lines = [line for line in data.splitlines()[:2] if line.strip()]
        if len(lines) == 2 and all(_is_json(line) for line in lines):
            return open_json_lines(path, columns)
        raise InputError(f"is not JSON ({error})", where=path, hint="fetch it again, or take it out") from error
    return _opened(document, columns, path)


def _opened(document: Any, columns: Columns, path: str) -> OpenedFile:
    if isinstance(document, list):
        return _array(document, columns, path, "JSON array")
    if not isinstance(document, dict):
        raise NoCaptions(f"a JSON {type(document).__name__}, which holds no captions", where=path)
    if (found := _coco(document)) is not None:
        return open_records(found[:_SAMPLE], found, columns, path, "COCO captions")
    if (found := _karpathy(document)) is not None:
        return open_records(found[:_SAMPLE], found, columns, path, "Karpathy split")
    values = list(document.values())
    if values and all(isinstance(value, dict) and "p" in value for value in values[:_SAMPLE]):
        columns = Columns(columns.caption or "p", columns.url)
        return open_records(values[:_SAMPLE], values, columns, path, "DiffusionDB part")
    for name in _BELOW:
        below = document.get(name)
        if isinstance(below, list) and below and isinstance(below[0], dict | str):
            return _array(below, columns, path, f"JSON array below {name!r}")
    return _by_name(document, values, columns, path)


def _array(items: list[Any], columns: Columns, path: str, name: str) -> OpenedFile:
    if not items:
        return OpenedFile(iter(()), name)
    if isinstance(items[0], str):
        return OpenedFile(_texts(items), f"{name} of strings")
    if not any(isinstance(item, dict) for item in items[:_SAMPLE]):
        raise NoCaptions(f"a {name} of neither objects nor strings", where=path)
    return open_records(items[:_SAMPLE], items, columns, path, name)


def _by_name(document: dict[str, Any], values: list[Any], columns: Columns, path: str) -> OpenedFile:
    """Return captions by name (a caption, or a list of them), objects by name, or lists by column."""
    first = values[:_SAMPLE]
    lengths = {len(value) for value in first if isinstance(value, list | dict)}
    if first and len(lengths) == 1 and all(isinstance(value, list | dict) for value in first):
        lists = [list(value.values()) if isinstance(value, dict) else value for value in values]
        transposed = [dict(zip(document, row, strict=True)) for row in zip(*lists, strict=False)]
        try:
            return open_records(transposed[:_SAMPLE], transposed, columns, path, "JSON lists by column")
        except InputError:
            pass  # then these are the objects of rows, or lists of captions
    if first and all(isinstance(value, dict) for value in first):
        return open_records(first, values, columns, path, "JSON objects by name")
    texts = [isinstance(v, str) or (isinstance(v, list) and v and isinstance(v[0], str)) for v in first]
    if len(first) > 1 and all(texts):
        return open_records([{"caption": first[0]}], _named(document, values), Columns(), path, "JSON captions by name")
    names = ", ".join(repr(name[:40]) for name in list(document)[:8])
    raise NoCaptions(f"a JSON object without captions in a known form (keys: {names})", where=path)


def _named(document: dict[str, Any], values: list[Any]) -> Iterator[dict[str, Any]]:
    for name, value in zip(document, values, strict=True):
        yield {"caption": value, "url": name if "://" in name else None}


def _coco(document: dict[str, Any]) -> list[Any] | None:
    notes = document.get("annotations")
    if not isinstance(notes, list) or not notes or not isinstance(notes[0], dict) or "caption" not in notes[0]:
        return None
    images = document.get("images")
    listed = images if isinstance(images, list) else []
    urls = {
        image.get("id"): image.get("coco_url") or image.get("flickr_url") or image.get("url")
        for image in listed
        if isinstance(image, dict) and isinstance(image.get("id"), int | str)
    }
    return [
        {**note, "url": note.get("url") or urls.get(_hashable(note.get("image_id")))}
        if isinstance(note, dict)
        else note
        for note in notes
    ]


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else None


def _karpathy(document: dict[str, Any]) -> list[Any] | None:
    images = document.get("images")
    if not isinstance(images, list) or not images or not isinstance(images[0], dict):
        return None
    if not isinstance(images[0].get("sentences"), list):
        return None
    found: list[Any] = []
    for image in images:
        sentences = image.get("sentences") if isinstance(image, dict) else None
        for sentence in sentences if isinstance(sentences, list) else [None]:
            raw = sentence.get("raw") if isinstance(sentence, dict) else sentence
            found.append({"caption": raw, "url": image.get("url") if isinstance(image, dict) else None})
    return found


def _texts(items: Iterable[Any]) -> Iterator[RawBatch]:
    builder = Builder()
    for item in items:
        if isinstance(item, str):
            builder.add(item)
        else:
            builder.reject(Bad(Reason.ROW_MALFORMED, f"a JSON {type(item).__name__}, not a string"))
        if builder.full:
            yield builder.take()
    if builder:
        yield builder.take()


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | str)
    except (ValueError, RecursionError):
        return False
