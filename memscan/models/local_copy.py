"""Model folders on s3://: copied once to each machine, whole, and used from there.

The copy's name carries what the storage says of every object (size and ETag), so an object that was replaced is copied
anew and two versions are never mixed. Several processes of a machine take one copy: the first makes it, others wait.
The cache is `MEMSCAN_CACHE`, or `memscan/` below the user's cache folder; removing it costs the next start a copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memscan.errors import MemscanError, ModelError
from memscan.io import storage
from memscan.models.specification import HASHED_SUFFIXES


def cache_folder() -> Path:
    """Where copies are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("MEMSCAN_CACHE") or Path(base) / "memscan")


def stage(path: str) -> Path:
    """The local copy of a folder on s3://, made if there is none: weights and configuration, no pickles.

    Raises:
        ModelError: there is no such folder, or it holds none of these files.
        MemscanError: the cache cannot be written, or the storage does not answer.
    """
    if not storage.is_dir(path):
        raise ModelError("no such model folder", where=path)
    wanted = {name: stamp for name, stamp in storage.stamps(path).items() if name.endswith(HASHED_SUFFIXES)}
    if not wanted:
        raise ModelError("holds no weight or configuration files", where=path)
    target = cache_folder() / "models" / _name(path, wanted)
    if not target.is_dir():
        with _one_at_a_time(target):
            if not target.is_dir():
                _copy(path, sorted(wanted), target)
    return target


def _name(path: str, stamps: dict[str, str]) -> str:
    text = "\n".join([path.rstrip("/"), *(f"{name}\0{stamp}" for name, stamp in sorted(stamps.items()))])
    tail = re.sub(r"[^\w.-]+", "_", path.rstrip("/").rsplit("/", 1)[-1])
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}/{tail}"


def _copy(path: str, names: Sequence[str], target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        for name in names:
            if ".." in name.split("/"):
                raise ModelError(f"holds an object whose name leaves the folder ({name})", where=path)
            storage.fetch(storage.join(path, name), temporary / name)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Held by one process of the machine; the lock goes with the process that holds it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock").open("w")
    except OSError as error:
        raise MemscanError(
            f"cannot write the cache ({error})", where=str(target.parent), hint="set MEMSCAN_CACHE to a folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
