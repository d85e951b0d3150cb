"""This module reads samples of a tar in WebDataset's convention, as img2dataset writes them.

Only the current member is unpacked.

Every member that is an image by its first bytes is a reference. Its caption (.txt) and metadata (.json with caption and
url) are the members of the same name up to the last dot, or else up to the first one: WebDataset ends a sample's name
at the first dot, but names out of titles and addresses have dots of their own. Members that are neither are named. A
tar that breaks off gives the samples before that, and one reject for the rest.
"""

from __future__ import annotations

import struct
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from memscan.errors import InputError, Reason
from memscan.io import storage
from memscan.io.compressed import compression_of, open_stream, without_suffix
from memscan.io.content import HEAD, image_format
from memscan.io.images import MAX_BYTES
from memscan.io.listing import NotTaken, printable
from memscan.sources.captions import MAX_TEXT, caption_of, facts_of
from memscan.sources.layouts import IMAGE_SUFFIXES

Row = dict[str, Any]
_BLOCK = 1 << 18
# Headers are parsed by the library as they come, and rubbish in them ends in any of these.
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, LookupError, TypeError, struct.error, OSError)


def read_tar(path: str, name: str, batch: int, not_taken: list[NotTaken] | None = None) -> Iterator[list[Row]]:
    """Yield the rows of a tar, at most `batch` at a time.

    Args:
        name: of the tar below its source, for the ids.
        not_taken: receives the members that are no part of a reference.
    """
    rows: list[Row] = []
    for row in _rows(path, name, [] if not_taken is None else not_taken):
        rows.append(row)
        if len(rows) == batch:
            yield rows
            rows = []
    if rows:
        yield rows


def _rows(path: str, name: str, not_taken: list[NotTaken]) -> Iterator[Row]:
    plain = without_suffix(name)
    stem = str(PurePosixPath(plain).with_suffix("")) if plain.lower().endswith((".tar", ".tgz")) else plain
    folder = f"{stem.rpartition('/')[0]}/" if "/" in stem else ""
    own = stem.rpartition("/")[2]
    count = 0
    try:
        with _seekable(path) as (file, cut), tarfile.open(fileobj=file, mode="r:") as tar:
            members, problem = _members(tar)
            beside = _Beside(tar, members)
            for member in members:
                shown = _shown(member)
                why = _why_not(tar, member, shown)
                if why is None:
                    key = _key(shown)
                    row = _row(f"{folder}{key}" if key.startswith(own) else f"{stem}/{key}", beside.texts(shown))
                    row |= _image(tar, member)
                    count += 1
                    yield row
                elif why:
                    not_taken.append(NotTaken(f"{printable(name)}/{shown}", why))
            not_taken += [NotTaken(f"{printable(name)}/{left}", "text without an image") for left in beside.left()]
            if cut or problem:
                raise cut or problem or EOFError
    except (*_DAMAGE, InputError) as error:
        message = f"the tar breaks off after {count} samples ({printable(str(error))})"
        yield {"reference_id": f"{stem}/", "reason": Reason.ROW_MALFORMED.value, "message": message}


@contextmanager
def _seekable(path: str) -> Iterator[tuple[IO[bytes], InputError | None]]:
    """Open a tar as a local file that is not compressed, by a copy if needed, and say what broke the copying off."""
    if not storage.is_remote(path) and compression_of(path) is None:
        with storage.open_input(path) as file:
            yield file, None
        return
    cut: InputError | None = None
    with tempfile.TemporaryDirectory(prefix="memscan-tar-") as scratch:
        local = Path(scratch) / "copy.tar"
        with open_stream(path) as source, local.open("wb") as target:
            try:
                read = getattr(source, "read1", source.read)  # all that there is before an error
                while block := read(_BLOCK):
                    target.write(block)
            except InputError as error:
                cut = error
        with local.open("rb") as file:
            yield file, cut


def _members(tar: tarfile.TarFile) -> tuple[list[tarfile.TarInfo], Exception | None]:
    """Return the files of a tar up to the place where it breaks off, and what is wrong there."""
    found: list[tarfile.TarInfo] = []
    try:
        for member in tar:
            if member.size < 0:
                raise tarfile.ReadError(f"member {printable(member.name)[:80]!r} has a negative size")
            if member.isfile():
                found.append(member)
    except _DAMAGE as error:
        return found, error
    return found, None


def _why_not(tar: tarfile.TarFile, member: tarfile.TarInfo, shown: str) -> str | None:
    """Return None for an image, "" for what may belong to one, otherwise why it is neither."""
    last = shown.rpartition("/")[2]
    if last.startswith("._") or "__MACOSX/" in shown:
        return "a resource fork of macOS"
    if last.startswith("."):
        return "hidden"
    if image_format(_content(tar, member, HEAD)):
        return None
    lower = last.lower()
    if lower.endswith((".txt", ".json")):
        return ""
    if lower.endswith(IMAGE_SUFFIXES):
        return None  # it says that it is one: what is wrong with it is a reject with its reason
    return "not an image"


def _key(shown: str) -> str:
    """Return the sample's name: up to the last dot, where an ending follows it."""
    folder, slash, last = shown.rpartition("/")
    base, dot, ending = last.rpartition(".")
    known = f".{ending.lower()}" in IMAGE_SUFFIXES or (dot and len(ending) <= 5 and ending.isalnum())
    return f"{folder}{slash}{base if base and known else last}"


class _Beside:
    """These are the texts of a tar by their names; those that belong to no image are left."""

    def __init__(self, tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> None:
        self._tar = tar
        self._texts = {
            _lower_ending(shown): member
            for member in members
            if (shown := _shown(member)).lower().endswith((".txt", ".json")) and not _is_private(shown)
        }
        self._used: set[str] = set()

    def texts(self, shown: str) -> dict[str, bytes | None]:
        """Return the .txt and .json of an image."""
        folder, slash, last = shown.rpartition("/")
        stems = dict.fromkeys((last.rpartition(".")[0] or last, last, last.partition(".")[0]))
        found: dict[str, bytes | None] = {"txt": None, "json": None}
        for ending in found:
            names = (f"{folder}{slash}{stem}.{ending}" for stem in stems)
            name = next((name for name in names if name in self._texts), None)
            if name is not None:
                self._used.add(name)
                try:
                    found[ending] = _content(self._tar, self._texts[name], MAX_TEXT)
                except _DAMAGE:
                    continue  # the tar breaks off there, which is told at its end
        return found

    def left(self) -> list[str]:
        """Return the names of texts that no image has."""
        return [_shown(member) for name, member in self._texts.items() if name not in self._used]


def _lower_ending(shown: str) -> str:
    stem, dot, ending = shown.rpartition(".")
    return f"{stem}{dot}{ending.lower()}"


def _shown(member: tarfile.TarInfo) -> str:
    return printable(member.name).removeprefix("./")


def _is_private(shown: str) -> bool:
    return shown.rpartition("/")[2].startswith(".") or "__MACOSX/" in shown


def _image(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    """Return a member's bytes, or why it can be no image: too large, or with holes, which would be filled in memory."""
    if member.issparse() or member.size > MAX_BYTES:
        message = f"{member.size} bytes, or holes; at most {MAX_BYTES} bytes are read"
        return {"reason": Reason.IMAGE_TOO_LARGE.value, "message": message}
    return {"image": _content(tar, member, MAX_BYTES)}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """Return the first bytes of a member. Raises ReadError if the tar ends before them."""
    if member.issparse():
        return b""
    reader = tar.extractfile(member)
    data = reader.read(min(most, member.size)) if reader else b""
    if len(data) < min(most, member.size):
        raise tarfile.ReadError("unexpected end of data")
    return data


def _row(name: str, texts: dict[str, bytes | None]) -> Row:
    facts = facts_of(texts["json"])
    caption = caption_of(texts["txt"]) if texts["txt"] is not None else facts.get("caption")
    return {
        "reference_id": name,
        "caption": caption if isinstance(caption, str) else None,
        "url": facts["url"] if isinstance(facts.get("url"), str) else None,
    }
