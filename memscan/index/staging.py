"""An index where it can be mapped into memory: on this machine's disk, each byte checked once a machine.

An index on s3:// is copied to a cache first, by one process of a machine while the others wait. Files that were checked
are noted with size and time of change; a process that finds them as noted need not read them again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memscan import storage
from memscan.errors import IntegrityError
from memscan.index.manifest import Manifest, verify_file

CACHE_VARIABLE = "MEMSCAN_CACHE"


def cache_folder() -> Path:
    """Where staged indexes lie: $MEMSCAN_CACHE, else ~/.cache/memscan. Put it on local NVMe."""
    set_by_user = os.environ.get(CACHE_VARIABLE)
    return Path(set_by_user) if set_by_user else Path.home() / ".cache" / "memscan"


def stage(folder: str, manifest: Manifest) -> str:
    """A local folder with the files of a version of an index, verified.

    Raises:
        IntegrityError: names the first file that is missing, truncated or altered.
        MemscanError: the cache cannot be written (full).
    """
    if not storage.is_remote(folder):
        _verify_once(folder, manifest)
        return folder
    target = cache_folder() / "indexes" / manifest.hash
    with _locked(target):
        for name, entry in manifest.files():
            local = target / name
            if _noted(target, name, local):
                continue
            if not local.exists() or local.stat().st_size != entry.bytes:
                verify_file(storage.join(folder, name), entry, "size")
                storage.fetch_file(storage.join(folder, name), local)
            _check(local, name, entry.sha256, folder)
            _note(target, name, local)
    return str(target)


def _check(local: Path, name: str, sha256: str, folder: str) -> None:
    try:
        storage.verify_sha256(local, sha256)
    except IntegrityError as error:
        local.unlink()
        raise IntegrityError(error.what, where=storage.join(folder, name), hint=error.hint) from error


def _verify_once(folder: str, manifest: Manifest) -> None:
    manifest.verify(folder, "size")
    place = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    notes = cache_folder() / "verified" / place
    with _locked(notes):
        for name, entry in manifest.files():
            local = Path(storage.join(folder, name))
            if not _noted(notes, f"{entry.sha256}", local):
                verify_file(str(local), entry, "hash")
                _note(notes, entry.sha256, local)


def _noted(notes: Path, name: str, file: Path) -> bool:
    try:
        known = json.loads(_note_file(notes, name).read_text(encoding="ascii"))
        status = file.stat()
    except (OSError, ValueError):
        return False
    return bool(known == [str(file), status.st_size, status.st_mtime_ns, status.st_ino])


def _note(notes: Path, name: str, file: Path) -> None:
    status = file.stat()
    storage.write_atomic(
        _note_file(notes, name),
        json.dumps([str(file), status.st_size, status.st_mtime_ns, status.st_ino]).encode("ascii"),
    )


def _note_file(notes: Path, name: str) -> Path:
    return notes / "verified" / (name.replace("/", "_") + ".json")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock goes with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
