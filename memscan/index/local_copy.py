"""This module copies an index to this machine's disk, where it can be mapped into memory.

Each byte is checked once per machine.

Files on s3:// are copied to a cache first, by one process of a machine while the others wait. What was checked is noted
with its hash, size and time of change; a process that finds a file as noted need not read it again. A shard's place in
the cache has the hash of its content in its name, so versions of an index share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from memscan.errors import IntegrityError
from memscan.index.manifest import FileEntry, Manifest, Shard, verify_file
from memscan.io import storage
from memscan.io.cache import CACHE_VARIABLE, cache_folder, check_room, one_at_a_time

_LARGER = f"set {CACHE_VARIABLE} to a larger disk, or spread the index with resources.search=scatter"


def stage(folder: str, manifest: Manifest) -> None:
    """Bring all files of a version of an index to this machine, verified.

    Raises:
        IntegrityError: names the first file that is missing, truncated or altered.
        MemscanError: they do not fit on the cache's disk, or it cannot be written.
    """
    if not storage.is_remote(folder):
        manifest.verify(folder, "size")
    for shard in manifest.shards:
        stage_shard(folder, shard)


def stage_shard(folder: str, shard: Shard, names: Collection[str] | None = None) -> str:
    """Return a local folder with the files of a shard (or some of them), verified. Raises as `stage`."""
    source = storage.join(folder, "shards", shard.name)
    wanted = {name: entry for name, entry in shard.files.items() if names is None or name in names}
    content = hashlib.sha256(repr(sorted(shard.files.items())).encode()).hexdigest()[:16]
    return _staged(source, wanted, _home(folder) / f"{shard.name}-{content}")


def stage_template(folder: str, manifest: Manifest) -> str:
    """Return a local folder in whose `template` the trained, empty indexes are, verified. Raises as `stage`."""
    content = hashlib.sha256(repr(sorted(manifest.template.items())).encode()).hexdigest()[:16]
    place = _home(folder) / f"template-{content}" / "template"
    return str(Path(_staged(storage.join(folder, "template"), manifest.template, place)).parent)


def stage_file(folder: str, name: str, entry: FileEntry) -> str:
    """Return a local path of one file of an index, verified. Raises as `stage`."""
    inner, _, last = name.rpartition("/")
    place = _home(folder) / f"{inner}-{entry.sha256[:16]}"
    return storage.join(_staged(storage.join(folder, inner), {last: entry}, place), last)


@contextmanager
def passing_shard(folder: str, shard: Shard, names: Collection[str]) -> Iterator[str]:
    """Stage a shard as `stage_shard` does, and delete the copy after the block.

    Only one shard at a time then takes disk space.
    """
    if not storage.is_remote(folder):
        yield stage_shard(folder, shard, names)
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="passing-", dir=cache_folder()) as scratch:
        for name in names:
            source = storage.join(folder, "shards", shard.name, name)
            _fetch(source, shard.files[name], Path(scratch) / name)
        yield scratch


def _home(folder: str) -> Path:
    place = folder if storage.is_remote(folder) else os.path.abspath(folder)
    return cache_folder() / "indexes" / hashlib.sha256(place.encode()).hexdigest()[:16]


def _staged(source: str, files: Mapping[str, FileEntry], notes: Path) -> str:
    """Verified files of a folder: in place where it is local, otherwise copied beside their notes."""
    remote = storage.is_remote(source)
    place = notes if remote else Path(source)
    with one_at_a_time(notes / ".lock"):
        left = {name: entry for name, entry in files.items() if not _noted(notes, entry, place / name)}
        if remote and left:
            check_room(sum(entry.bytes for entry in left.values()), source, _LARGER)
        for name, entry in left.items():
            if remote:
                _fetch(storage.join(source, name), entry, place / name)
            else:
                verify_file(storage.join(source, name), entry)
            _note(notes, entry, place / name)
    return str(place)


def _fetch(source: str, entry: FileEntry, local: Path) -> None:
    if not local.exists() or local.stat().st_size != entry.bytes:
        verify_file(source, entry, "size")
        storage.fetch(source, local)
    try:
        verify_file(str(local), entry)
    except IntegrityError as error:
        local.unlink(missing_ok=True)
        raise IntegrityError(error.what, where=source, hint=error.hint) from error


def _noted(notes: Path, entry: FileEntry, file: Path) -> bool:
    try:
        known = json.loads(_note_file(notes, entry, file).read_text(encoding="ascii"))
        return bool(known == _state(entry, file))
    except (OSError, ValueError):
        return False


def _note(notes: Path, entry: FileEntry, file: Path) -> None:
    storage.write_atomic(_note_file(notes, entry, file), json.dumps(_state(entry, file)).encode("ascii"))


def _state(entry: FileEntry, file: Path) -> list[str | int]:
    status = file.stat()
    return [entry.sha256, entry.bytes, status.st_size, status.st_mtime_ns, status.st_ino]


def _note_file(notes: Path, entry: FileEntry, file: Path) -> Path:
    return notes / ".verified" / f"{file.name}-{entry.sha256[:16]}.json"
