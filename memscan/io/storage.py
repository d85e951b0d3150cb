"""Local paths and s3:// through one door, with atomic writes and hashes.

Every function takes a path as text or `os.PathLike`; text beginning with `s3://` goes to S3 (the `s3` extra, with the
credentials and endpoint that the AWS variables and files name), all else is local. What the user can act on (missing,
forbidden, full disk) comes out as a one-line `MemscanError`: `InputError` for reads.

A reader never sees half a file: local writes go to a temporary name beside the target and are renamed, S3 writes are a
single put. `s3.py` says how often S3 is tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

from memscan.errors import InputError, IntegrityError, MemscanError
from memscan.io import s3
from memscan.io.s3 import one_line as _one_line

if TYPE_CHECKING:
    import pyarrow.fs

PathLike: TypeAlias = str | os.PathLike[str]

_S3 = "s3://"
_CHUNK_BYTES = 1 << 20


def is_remote(path: PathLike) -> bool:
    """Whether the path is on S3."""
    return _text(path).startswith(_S3)


def join(base: PathLike, *parts: str) -> str:
    """`base` with relative parts below it; an absolute part is taken as relative, so nothing leaves `base` by it."""
    head = _text(base)
    stripped = head.rstrip("/") if head != _S3 else head
    tail = [part.strip("/") for part in parts if part.strip("/")]
    if not head:
        return "/".join(tail)
    return "/".join([stripped, *tail]) if stripped or tail else "/"


def is_inner(name: str) -> bool:
    """Whether a name out of a manifest stays in its folder: relative, without "..", backslashes and empty parts.

    Names that come from data are looked at by this before they are joined to a path.
    """
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


def exists(path: PathLike) -> bool:
    """Whether a file or folder is there. A folder on S3 is there if a key begins with it."""
    text = _text(path)
    if text.startswith(_S3):
        with _one_line(text, "read"):
            return bool(s3.client().exists(text))
    return os.path.exists(text)


def is_dir(path: PathLike) -> bool:
    """Whether a folder is there."""
    text = _text(path)
    if text.startswith(_S3):
        with _one_line(text, "read"):
            return bool(s3.client().isdir(text))
    return os.path.isdir(text)


def file_size(path: PathLike) -> int:
    """Size of a file in bytes. Raises InputError where there is none."""
    text = _text(path)
    with _one_line(text, "read"):
        return int(s3.client().size(text)) if text.startswith(_S3) else os.stat(text).st_size


def list_files(path: PathLike, suffixes: str | Sequence[str], *, hidden: bool = False) -> list[str]:
    """Files below a folder, at any depth, whose names end in one of `suffixes` (any case), sorted.

    Names that begin with a dot, and what lies in folders named so, are left out: they are temporary or private. With
    `hidden`, files that are named so are given too, but not what lies in such folders.

    Raises:
        InputError: there is no such folder, or a folder below it cannot be read.
    """
    text = _text(path)
    endings = tuple(s.lower() for s in ([suffixes] if isinstance(suffixes, str) else suffixes))
    if not is_dir(text):
        raise InputError("no such folder", where=text)
    with _one_line(text, "list"):
        if text.startswith(_S3):
            root = text.rstrip("/") + "/"
            relative = [(_S3 + key).removeprefix(root) for key in s3.client().find(root)]
            private = [name.split("/")[:-1] if hidden else name.split("/") for name in relative]
            found = [
                root + name
                for name, parts in zip(relative, private, strict=True)
                if not any(part.startswith(".") for part in parts)
            ]
        else:
            found = list(_walk(text, hidden))
    return sorted(file for file in found if file.lower().endswith(endings))


def stamps(path: PathLike) -> dict[str, str]:
    """Relative name -> what changes whenever the content does (size and ETag on S3, size and time on a disk).

    Cheap: nothing is read. Of every file below a folder, temporary ones left out as in `list_files`.

    Raises:
        InputError: as `list_files`.
    """
    text = _text(path)
    root = text.rstrip("/") + "/"
    files = list_files(text, ("",))
    with _one_line(text, "list"):
        if text.startswith(_S3):
            found = s3.client().find(root, detail=True)
            facts = {name: found[name.removeprefix(_S3)] for name in files}
            return {name.removeprefix(root): f"{fact['size']} {fact.get('ETag', '')}" for name, fact in facts.items()}
        statuses = {name: os.stat(name) for name in files}
        return {name.removeprefix(root): f"{one.st_size} {one.st_mtime_ns}" for name, one in statuses.items()}


def fetch(path: PathLike, target: Path) -> None:
    """Copy a file to this machine, whole or not at all; the length is checked.

    Raises:
        InputError: it is missing, or shorter than its storage says.
        MemscanError: the target cannot be written (full disk).
    """
    text = _text(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    make_dirs(target.parent)
    try:
        with open_input(text) as source, _one_line(str(target), "write"), open(temporary, "xb") as file:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
        if temporary.stat().st_size != file_size(text):
            raise InputError(f"only {temporary.stat().st_size} of {file_size(text)} bytes arrived", where=text)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def open_input(path: PathLike) -> IO[bytes]:
    """Open a file for reading bytes; seekable. Raises InputError where it is missing, forbidden or a folder."""
    text = _text(path)
    with _one_line(text, "read"):
        if not text.startswith(_S3):
            return open(text, "rb")
        return cast("IO[bytes]", s3.Told(s3.client().open(text, "rb"), text, "read"))


def read_bytes(path: PathLike) -> bytes:
    """The whole content of a file. Raises InputError as `open_input` does."""
    text = _text(path)
    with _one_line(text, "read"):
        if text.startswith(_S3):
            # One request. A file object asks for the size first and then for ranges of that very version, and fails
            # where somebody replaces the object in between, as the holder of a lease does.
            return bytes(s3.client().cat_file(text))
        with open_input(path) as file:
            return file.read()


def read_json(path: PathLike) -> Any:
    """The content of a JSON file. Raises InputError where it is missing or not JSON."""
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
    """Write a file whole or not at all, replacing what was there and making missing folders.

    Raises:
        MemscanError: the place cannot be written (forbidden, full).
    """
    text = _text(path)
    with _one_line(text, "write"):
        if text.startswith(_S3):
            s3.client().pipe_file(text, data)
        else:
            _write_local(Path(text), data)


def move_in(local: PathLike, path: PathLike) -> None:
    """Put a finished local file in its place, local or s3://, whole or not at all; the local file is gone afterwards.

    Raises:
        MemscanError: the place cannot be written (forbidden, full).
    """
    text = _text(path)
    with _one_line(text, "write"):
        if text.startswith(_S3):
            s3.client().put_file(os.fspath(local), text)
            os.remove(local)
            return
        target = Path(text)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            shutil.move(os.fspath(local), temporary)  # a rename, or a copy from another file system
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def fetch_file(path: PathLike, local: PathLike) -> None:
    """Copy a file, local or s3://, to a local path; whole or not at all. Raises InputError where there is none."""
    text, target = _text(path), Path(local)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with _one_line(text, "read"):
        try:
            if text.startswith(_S3):
                s3.client().get_file(text, str(temporary))
            else:
                shutil.copyfile(text, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def create_new(path: PathLike, data: bytes) -> bool:
    """Write a file whole if there is none yet, making missing folders; False where there is one. Atomic: of several
    writers, one wins.

    Raises:
        MemscanError: the place cannot be written (forbidden, full).
    """
    text = _text(path)
    with _one_line(text, "write"):
        try:
            if text.startswith(_S3):
                s3.client().pipe_file(text, data, mode="create")
            else:
                _write_local(Path(text), data, replace=False)
        except FileExistsError:
            return False
    return True


def make_dirs(path: PathLike) -> None:
    """Make a folder and its parents; nothing to do on S3. Raises MemscanError where that cannot be done."""
    text = _text(path)
    if not text.startswith(_S3):
        with _one_line(text, "make"):
            os.makedirs(text, exist_ok=True)


def remove_tree(path: PathLike) -> None:
    """Remove a file or a folder with all that is in it; nothing to do where there is none.

    Raises:
        MemscanError: a file cannot be removed, or the path is a file system's root or a whole bucket.
    """
    text = _text(path)
    with _one_line(text, "remove"):
        if text.startswith(_S3):
            if "/" not in text.removeprefix(_S3).rstrip("/"):
                raise MemscanError("refusing to remove a whole bucket", where=text)
            if s3.client().exists(text):
                s3.client().rm(text, recursive=True)
        elif os.path.islink(text) or os.path.isfile(text):
            os.remove(text)
        elif os.path.isdir(text):
            if os.path.dirname(os.path.abspath(text)) == os.path.abspath(text):
                raise MemscanError("refusing to remove the root of the file system", where=text)
            shutil.rmtree(text)


def sha256_file(path: PathLike) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
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
            hint="the file is damaged or another one: restore it, or correct the expected hash if you trust it",
        )


def arrow_filesystem(path: PathLike) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a path and the path inside it, as pyarrow and Ray Data take them."""
    import pyarrow.fs

    text = _text(path)
    if text.startswith(_S3):
        from memscan.io.s3_arrow import ArrowHandler

        return pyarrow.fs.PyFileSystem(ArrowHandler(s3.client())), text.removeprefix(_S3)
    return pyarrow.fs.LocalFileSystem(), os.path.abspath(text)


def _text(path: PathLike) -> str:
    text = os.fspath(path)
    if text.startswith("s3:/") and not text.startswith(_S3):
        text = _S3 + text.removeprefix("s3:/")  # pathlib folds the two slashes into one
    scheme, sign, rest = text.partition("://")
    if sign and "@" in rest.partition("/")[0]:
        raise InputError(
            "credentials do not belong into a path: it is kept in run.json and shown in reports",
            where=text,
            hint="use AWS's own variables, files or instance roles",
        )
    if sign and scheme != "s3":
        raise InputError(f"paths of kind {scheme}:// are not supported", where=text, hint="use a local path or s3://")
    return text


def _walk(top: str, hidden: bool = False) -> Iterator[str]:
    """Files below a local folder; follows links to folders, each real folder once; an unreadable folder is an error."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (os.path.join(folder, file) for file in files if hidden or not file.startswith("."))


def _write_local(path: Path, data: bytes, *, replace: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename, it fails where the name is taken
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power cut could undo the rename of a commit record
    finally:
        os.close(folder)
