"""This module copies model folders on s3:// once to each machine, completely, and uses them from there.

The copy's name carries what the storage says of every object (size and ETag), so an object that was replaced is copied
again and two versions are never mixed. Several processes of a machine take one copy: the first makes it, others wait.
The cache is that of `memscan.io.cache`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from memscan.errors import ModelError
from memscan.io import storage
from memscan.io.cache import cache_folder, check_room, one_at_a_time
from memscan.models.specification import HASHED_SUFFIXES


def stage(path: str) -> Path:
    """Return the local copy of a folder on s3://, and make it if there is none.

    It has weights and configuration, but no pickles.

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
        with one_at_a_time(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                check_room(sum(storage.file_size(storage.join(path, name)) for name in wanted), path)
                _copy(path, sorted(wanted), target)
    return target


def stage_file(path: str) -> Path:
    """Return a file of a model on this machine: itself, or the local copy of one on s3://, made if there is none.

    Raises:
        ModelError: there is no such file on s3://; a local one is not looked for.
        MemscanError: the cache cannot be written, or the storage does not answer.
    """
    if not storage.is_remote(path):
        return Path(path)
    folder, _, name = path.rpartition("/")
    stamp = storage.stamps(folder).get(name) if storage.is_dir(folder) else None
    if stamp is None:
        raise ModelError("no such model file", where=path)
    target = cache_folder() / "files" / hashlib.sha256(f"{path}\0{stamp}".encode()).hexdigest()[:16] / name
    if not target.is_file():
        with one_at_a_time(target.with_name(f".{name}.lock")):
            if not target.is_file():
                check_room(storage.file_size(path), path)
                temporary = target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
                try:
                    storage.fetch(path, temporary)
                    os.replace(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)
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
