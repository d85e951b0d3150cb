"""This module gives one interface to local paths and object stores, with atomic writes and hashes.

Every function takes a path as text or `os.PathLike`. Text that begins with one of `remote.STORES` (s3://, gs://, az://
or abfs://, hf://, memory://) goes to that store through its fsspec driver, with the credentials that the store's own
variables and files name; all else is local. What the user can act on (missing, forbidden, full disk, no driver) comes
out as a one-line `MemscanError`: `InputError` for reads.

A reader never sees half a file: local writes go to a temporary name beside the target and are renamed, those of a store
are a single put. Runs, index builds and registries need more, a file that only one of several writers creates;
`check_exclusive` says where that cannot be had. `s3.py` says how often S3 is tried; other drivers have rules of their
own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from memscan.errors import InputError, IntegrityError, MemscanError
from memscan.io import remote
from memscan.io.faults import one_line as _one_line
from memscan.io.local import LocalFiles, beside

if TYPE_CHECKING:
    import pyarrow.fs

PathLike: TypeAlias = str | os.PathLike[str]

_CHUNK_BYTES = 1 << 20
_LOCAL = LocalFiles()
_FOLDED = re.compile(rf"({'|'.join(remote.STORES)}):/(?!/)")


def is_remote(path: PathLike) -> bool:
    """Return whether the path is in a store and not on this machine. Raises InputError for an unknown kind."""
    return bool(remote.scheme_of(_text(path)))


def check_exclusive(path: PathLike) -> None:
    """Refuse a place where a file cannot be created by exactly one of several writers, which a lease needs.

    Local folders, S3, Google Cloud Storage and Azure are fit for runs, index builds and registries; the others hold
    inputs only.

    Raises:
        MemscanError: names the kind of storage and the reason.
    """
    text = _text(path)
    scheme = remote.scheme_of(text)
    if scheme and (refusal := remote.STORES[scheme].refusal):
        raise MemscanError(
            f"{remote.STORES[scheme].title} can be used for inputs only: {refusal}",
            where=text,
            hint="write to a local folder, s3://, gs:// or az://",
        )


def join(base: PathLike, *parts: str) -> str:
    """Return `base` with relative parts below it.

    An absolute part is taken as relative, so that no path leaves `base`.
    """
    head = _text(base)
    stripped = head if head.endswith("://") else head.rstrip("/")
    tail = [part.strip("/") for part in parts if part.strip("/")]
    if not head:
        return "/".join(tail)
    if stripped.endswith("://"):
        return stripped + "/".join(tail)
    return "/".join([stripped, *tail]) if stripped or tail else "/"


def is_inner(name: str) -> bool:
    """Return whether a name of a manifest stays in its folder: relative, without "..", backslashes and empty parts.

    Names that come from data are checked by this before they are joined to a path.
    """
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


def exists(path: PathLike) -> bool:
    """Return whether a file or folder exists. A folder in a store exists if a key begins with it."""
    text = _text(path)
    with _one_line(text, "read"):
        return _files(text).exists(text)


def is_dir(path: PathLike) -> bool:
    """Return whether a folder exists."""
    text = _text(path)
    with _one_line(text, "read"):
        return _files(text).is_dir(text)


def file_size(path: PathLike) -> int:
    """Return the size of a file in bytes. Raises InputError if there is none."""
    text = _text(path)
    with _one_line(text, "read"):
        return _files(text).size(text)


def list_files(path: PathLike, suffixes: str | Sequence[str], *, hidden: bool = False) -> list[str]:
    """Return files below a folder, at any depth, whose names end in one of `suffixes` (any case), sorted.

    Names that begin with a dot, and what lies in folders named so, are left out: they are temporary or private. With
    `hidden`, files that are named so are given too, but not what lies in such folders.

    Raises:
        InputError: there is no such folder, or a folder below it cannot be read.
    """
    text = _text(path)
    endings = tuple(s.lower() for s in ([suffixes] if isinstance(suffixes, str) else suffixes))
    root = text.rstrip("/") + "/"
    return sorted(root + name for name in _found(text, hidden) if name.lower().endswith(endings))


def stamps(path: PathLike) -> dict[str, str]:
    """Return, by relative name, a value that changes whenever the content does.

    It is size and ETag on S3, and size and time on a disk.

    Cheap: nothing is read. Of every file below a folder, temporary ones left out as in `list_files`.

    Raises:
        InputError: as `list_files`; or the store does not give anything of that kind.
    """
    text = _text(path)
    with _one_line(text, "list"):
        return {name: _files(text).stamp(text, facts) for name, facts in sorted(_found(text).items())}


def ages(path: PathLike) -> dict[str, float]:
    """Return, by relative name, the seconds since each file below a folder was written.

    The clock is that of the storage.

    Raises:
        InputError: as `stamps`.
        MemscanError: nothing can be written there, which is how its clock is read.
    """
    text, probe = _text(path), f".{secrets.token_hex(8)}"
    write_atomic(join(text, probe), b"now")
    try:
        with _one_line(text, "list"):
            written = {name: _files(text).changed(text, facts) for name, facts in _found(text, hidden=True).items()}
    finally:
        remove_tree(join(text, probe))
    return {name: written[probe] - at for name, at in written.items() if name != probe}


def fetch(path: PathLike, local: PathLike) -> None:
    """Copy a file to this machine, completely or not at all, making missing folders; the length is checked.

    Raises:
        InputError: it is missing, or shorter than its storage says.
        MemscanError: the target cannot be written (full disk).
    """
    text, target = _text(path), Path(local)
    with open_input(text) as source, _one_line(str(target), "write"), beside(target) as temporary:
        with open(temporary, "xb") as file:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
        if temporary.stat().st_size != file_size(text):
            raise InputError(f"only {temporary.stat().st_size} of {file_size(text)} bytes arrived", where=text)


def open_input(path: PathLike) -> IO[bytes]:
    """Open a file for reading bytes; seekable. Raises InputError if it is missing, forbidden or a folder."""
    text = _text(path)
    with _one_line(text, "read"):
        return _files(text).open(text)


def read_bytes(path: PathLike) -> bytes:
    """Return the whole content of a file, by one request. Raises InputError as `open_input` does."""
    text = _text(path)
    with _one_line(text, "read"):
        return _files(text).read(text)


def read_json(path: PathLike) -> Any:
    """Return the content of a JSON file. Raises InputError if it is missing or not JSON."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON ({error})", where=_text(path)) from error


def write_json(path: PathLike, obj: Any) -> None:
    """Write JSON for people to read, atomically. Keys keep their order; NaN is refused (ValueError): it is not JSON."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode("utf-8"))


def write_atomic(path: PathLike, data: bytes) -> None:
    """Write a file completely or not at all, replacing what was there and making missing folders.

    Raises:
        MemscanError: the place cannot be written (forbidden, full).
    """
    text = _text(path)
    with _one_line(text, "write"):
        _files(text).write(text, data)


def move_in(local: PathLike, path: PathLike) -> None:
    """Put a finished local file in its place, completely or not at all; the local file is gone afterwards.

    Raises:
        MemscanError: the place cannot be written (forbidden, full).
    """
    text = _text(path)
    with _one_line(text, "write"):
        _files(text).put(os.fspath(local), text)


def create_new(path: PathLike, data: bytes) -> bool:
    """Write a complete file if there is none yet, making missing folders; False if there is one. Atomic: of several
    writers, one wins.

    Raises:
        MemscanError: the place cannot be written (forbidden, full), or as `check_exclusive`.
    """
    check_exclusive(path)
    text = _text(path)
    with _one_line(text, "write"):
        try:
            _files(text).create(text, data)
        except FileExistsError:
            return False
    return True


def make_dirs(path: PathLike) -> None:
    """Make a folder and its parents; nothing to do in a store. Raises MemscanError if that cannot be done."""
    text = _text(path)
    with _one_line(text, "make"):
        _files(text).make_dirs(text)


def remove_tree(path: PathLike) -> None:
    """Remove a file or a folder with everything that is in it; there is nothing to do if it does not exist.

    Raises:
        MemscanError: a file cannot be removed, or the path is a file system's root or a whole bucket.
    """
    text = _text(path)
    with _one_line(text, "remove"):
        _files(text).remove(text)


def sha256_file(path: PathLike) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with _one_line(_text(path), "read"), open_input(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify_sha256(path: PathLike, expected: str) -> None:
    """Check a file against the hash that its manifest or configuration promised.

    Raises:
        IntegrityError: the content is another one.
        InputError: there is no such file.
    """
    actual = sha256_file(path)
    if actual != expected.strip().lower():
        raise IntegrityError(
            f"sha256 is {actual}, expected {expected}",
            where=_text(path),
            hint="the file is damaged or was replaced: restore it, or correct the expected hash if you trust it",
        )


def arrow_filesystem(path: PathLike) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the pyarrow file system of a path and the path inside it, as pyarrow and Ray Data take them."""
    text = _text(path)
    return _files(text).arrow(text)


def _files(text: str) -> LocalFiles | remote.RemoteFiles:
    return remote.RemoteFiles(text) if remote.scheme_of(text) else _LOCAL


def _found(text: str, hidden: bool = False) -> dict[str, dict[str, Any]]:
    """Path below a folder -> what its storage says of it; nothing that is named, or lies in a folder named, with a dot.

    Raises:
        InputError: as `list_files`.
    """
    if not is_dir(text):
        raise InputError("no such folder", where=text)
    with _one_line(text, "list"):
        found = _files(text).find(text)
    parts = {name: name.split("/")[:-1] if hidden else name.split("/") for name in found}
    return {name: found[name] for name, own in parts.items() if not any(part.startswith(".") for part in own)}


def find_matching(pattern: str) -> list[str]:
    """Return the sorted files and folders whose names match a pattern with `*`, `?`, `[...]` and `**`.

    The pattern is for a store or a disk.

    Raises:
        InputError: the store does not answer.
    """
    text = _text(pattern)
    with _one_line(text, "list"):
        return sorted(_files(text).glob(text))


def _text(path: PathLike) -> str:
    text = os.fspath(path)
    if folded := _FOLDED.match(text):
        text = f"{folded[1]}://{text[folded.end() :]}"  # pathlib makes one slash of two
    remote.check_credentials(text)
    scheme = remote.scheme_of(text)
    if scheme and scheme not in remote.STORES:
        known = ", ".join(f"{one}://" for one in remote.STORES if one not in ("gcs", "abfss", "memory"))
        raise InputError(
            f"paths of kind {scheme}:// are not supported", where=text, hint=f"use a local path or {known}"
        )
    return text
