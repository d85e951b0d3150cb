"""This module specifies a model by its role, its name, the hash of its weights, and its preprocessing.

Two measurements are comparable only where their specifications are equal, so scores, thresholds and indexes carry the
specification's id. A folder's hash covers the files that decide the model's output, by name and content, and nothing
else: a model card or a cache beside them changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memscan.errors import IntegrityError, ModelError
from memscan.io import storage

HASHED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".py")


@dataclass(frozen=True)
class ModelSpec:
    """This is the identity of a measurement's model.

    Args:
        role: "generator", "segmenter" or "embedder".
        name: a name for people, without ":" or "@".
        sha256: hex digest of the weights (file) or of weights and configuration (folder).
        preprocessing: what is done to the input, in a few words without ":".
    """

    role: str
    name: str
    sha256: str
    preprocessing: str

    @property
    def id(self) -> str:
        """This is `role:name@sha12:preprocessing`."""
        return f"{self.role}:{self.name}@{self.sha256[:12]}:{self.preprocessing}"


def hash_file(path: str | Path) -> str:
    """Return the hex sha256 of a local file.

    It is computed once per process for one state (size and modification time) of the file.
    """
    real = os.path.realpath(path)
    status = os.stat(real)
    return _hash_file_state(real, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _hash_file_state(path: str, _size: int, _modified: int) -> str:
    return storage.sha256_file(path)


def hash_folder(folder: str | Path, parts: Sequence[str] = ()) -> str:
    """Return the hex sha256 over the sorted relative names and hashes of a model folder's files.

    These are its weight and configuration files.

    Args:
        folder: a local folder.
        parts: entries of the folder (sub-folders or files) to cover; all of it when empty.

    Raises:
        ModelError: no file to hash.
    """
    root = Path(folder)
    files = sorted(path for path in _walk(root, parts) if path.suffix in HASHED_SUFFIXES)
    if not files:
        raise ModelError("holds no weight or configuration files", where=str(folder))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def _walk(root: Path, parts: Sequence[str]) -> Iterable[Path]:
    for start in [root / part for part in parts] or [root]:
        if start.is_file():
            yield start
        for folder, subfolders, names in os.walk(start):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            yield from (Path(folder) / name for name in names if not name.startswith("."))


def read_verified(path: str, expected: str | None) -> tuple[bytes, str]:
    """Return a model file's bytes and their hex sha256, checked before anything parses them.

    The file is read once and what was hashed is what is returned, so it cannot change between check and use.

    Raises:
        ModelError: there is no such file.
        IntegrityError: the hash is not the expected one.
    """
    if not storage.exists(path) or storage.is_dir(path):
        raise ModelError("no such model file", where=path)
    data = storage.read_bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if expected is not None and found != expected.strip().lower():
        raise IntegrityError(
            f"sha256 is {found}, expected {expected.strip()}",
            where=path,
            hint="the file is damaged or another one; it was not loaded",
        )
    return data, found
