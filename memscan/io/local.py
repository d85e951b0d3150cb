"""This module handles files of this machine for `storage`.

A file is written completely or not at all, and it is on the disk when a write returns.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from memscan.errors import MemscanError

if TYPE_CHECKING:
    import pyarrow.fs


class LocalFiles:
    """This has the methods of `remote.RemoteFiles` for a disk.

    They let OSErrors pass, and `storage` makes one line of them.

    Writing goes past fsspec's local driver, whose writes are neither renamed into place nor synchronised.
    """

    def exists(self, text: str) -> bool:
        return os.path.exists(text)

    def is_dir(self, text: str) -> bool:
        return os.path.isdir(text)

    def size(self, text: str) -> int:
        return os.stat(text).st_size

    def find(self, text: str) -> dict[str, dict[str, Any]]:
        """Return the path below `text` -> where it is; a link that leads nowhere is among them."""
        root = text.rstrip("/") + "/"
        return {name.removeprefix(root): {"path": name} for name in _walk(text)}

    def stamp(self, text: str, facts: Any) -> str:
        status = os.stat(facts["path"])
        return f"{status.st_size} {status.st_mtime_ns}"

    def changed(self, text: str, facts: Any) -> float:
        return os.stat(facts["path"]).st_ctime  # not the time that a file brought with it from elsewhere

    def glob(self, text: str) -> list[str]:
        return glob.glob(text, recursive=True)

    def open(self, text: str) -> IO[bytes]:
        return open(text, "rb")

    def read(self, text: str) -> bytes:
        with self.open(text) as file:
            return file.read()

    def write(self, text: str, data: bytes) -> None:
        _write(Path(text), data)

    def create(self, text: str, data: bytes) -> None:
        """Create a file. Raises FileExistsError if there is one; of several writers, one succeeds."""
        _write(Path(text), data, replace=False)

    def put(self, local: str, text: str) -> None:
        with beside(Path(text)) as temporary:
            shutil.move(local, temporary)  # a rename, or a copy from another file system

    def make_dirs(self, text: str) -> None:
        os.makedirs(text, exist_ok=True)

    def remove(self, text: str) -> None:
        if os.path.islink(text) or os.path.isfile(text):
            os.remove(text)
        elif os.path.isdir(text):
            if os.path.dirname(os.path.abspath(text)) == os.path.abspath(text):
                raise MemscanError("refusing to remove the root of the file system", where=text)
            shutil.rmtree(text)

    def arrow(self, text: str) -> tuple[pyarrow.fs.FileSystem, str]:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), os.path.abspath(text)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Give a temporary name beside a file, which replaces it at the end of the block, or goes if the block fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes, *, replace: bool = True) -> None:
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


def _walk(top: str) -> Iterator[str]:
    """Files below a local folder; follows links to folders, each real folder once; an unreadable folder is an error.

    What lies in folders whose names begin with a dot is left out.
    """
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
        yield from (os.path.join(folder, file) for file in files)
