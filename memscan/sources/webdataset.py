"""Samples of a tar in WebDataset's convention, as img2dataset writes them: one pass, nothing unpacked.

Members whose names agree up to the first dot of the file name are one sample: an image, its caption (.txt) and its
metadata (.json with caption and url). A tar that breaks off gives the samples before that, and one reject for the rest.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from memscan.errors import Reason
from memscan.io import storage
from memscan.io.images import MAX_BYTES
from memscan.sources.layouts import IMAGE_SUFFIXES

Row = dict[str, Any]
_BLOCK = 1 << 20
MAX_TEXT = 1 << 20  # bytes of a caption or of metadata; the rest is not read


def read_tar(path: str, name: str, batch: int) -> Iterator[list[Row]]:
    """Rows of a tar, at most `batch` at a time.

    Args:
        name: of the tar below its source, for ids of samples whose key does not begin with the tar's own name.
    """
    rows: list[Row] = []
    for row in _rows(path, name):
        rows.append(row)
        if len(rows) == batch:
            yield rows
            rows = []
    if rows:
        yield rows


def _rows(path: str, name: str) -> Iterator[Row]:
    stem = str(PurePosixPath(name).with_suffix(""))
    key: str | None = None
    members: dict[str, bytes] = {}
    refused: dict[str, int] = {}  # images that are not read, with their sizes
    count = 0
    try:
        with storage.open_input(path) as file, tarfile.open(fileobj=file, mode="r|", bufsize=_BLOCK) as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"member {member.name[:80]!r} has a negative size")
                if not member.isfile():
                    continue
                own, extension = _split(member.name)
                if own != key:
                    if key is not None and (members or refused):
                        count += 1
                        yield _row(key, members, stem, refused)
                    key, members, refused = own, {}, {}
                if extension in _WANTED:
                    content = _content(tar, member)
                    if content is not None:
                        members[extension] = content
                    elif extension not in ("txt", "json"):
                        refused[extension] = member.size
    # Headers are parsed by the library as they come, and rubbish in them ends in any of these.
    except (tarfile.TarError, EOFError, ValueError, OverflowError, LookupError, TypeError, struct.error) as error:
        if key is not None and (members or refused):
            count += 1
            yield _row(key, members, stem, refused)
        message = f"the tar breaks off after {count} samples ({error})"
        yield {"reference_id": f"{stem}/", "reason": Reason.ROW_MALFORMED.value, "message": message}
        return
    if key is not None and (members or refused):
        yield _row(key, members, stem, refused)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """A member's bytes; of a text the first ones; None for one that no image can be: too large, or with holes."""
    is_text = member.name.lower().endswith((".txt", ".json"))
    if member.issparse() or (not is_text and member.size > MAX_BYTES):
        return None
    reader = tar.extractfile(member)
    return reader.read(MAX_TEXT if is_text else MAX_BYTES) if reader else b""


_WANTED = (*(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES), "txt", "json")


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.removeprefix("./").rpartition("/")
    base, _, extension = last.partition(".")
    return f"{folder}/{base}" if folder else base, extension.lower()


def _row(key: str, members: dict[str, bytes], stem: str, refused: dict[str, int]) -> Row:
    facts = _facts(members.get("json"))
    caption = _text(members["txt"]) if "txt" in members else facts.get("caption")
    row: Row = {
        # img2dataset's keys begin with the number of their tar; others may repeat from tar to tar.
        "reference_id": key if key.startswith(PurePosixPath(stem).name) else f"{stem}/{key}",
        "caption": caption if isinstance(caption, str) else None,
        "url": facts["url"] if isinstance(facts.get("url"), str) else None,
        "image": next((data for extension, data in members.items() if extension not in ("txt", "json")), None),
    }
    if row["image"] is None and refused:
        size = next(iter(refused.values()))
        row |= {"reason": Reason.IMAGE_TOO_LARGE.value, "message": f"{size} bytes, or holes, at most {MAX_BYTES}"}
    return row


def _facts(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}  # the image counts; its metadata are an extra
    return found if isinstance(found, dict) else {}


def _text(data: bytes) -> str:
    return " ".join(data.decode("utf-8", "replace").split())
