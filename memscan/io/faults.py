"""This module turns errors of a file system or network about a path into one line that names the path."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memscan.errors import InputError, MemscanError

# Libraries whose exceptions are the network's or the server's, where they are not OSErrors, and what to look at.
_NETWORK = {
    "botocore": "check the AWS credentials and endpoint",
    "aiobotocore": None,
    "gcsfs": "check the Google credentials (GOOGLE_APPLICATION_CREDENTIALS)",
    "google": "check the Google credentials (GOOGLE_APPLICATION_CREDENTIALS)",
    "azure": "check AZURE_STORAGE_ACCOUNT_NAME and the credentials",
    "huggingface_hub": "check the name of the repository and HF_TOKEN",
    "aiohttp": None,
    "fsspec": None,
    "http": None,
    "httpx": None,
    "requests": None,
}
_READS = ("read", "list")


@contextmanager
def one_line(path: str, verb: str) -> Iterator[None]:
    """Turn what the file system or the network says about a path into one line that names it.

    Raises:
        InputError: where the verb is "read" or "list".
        MemscanError: for all others.
    """
    kind = InputError if verb in _READS else MemscanError
    try:
        yield
    except FileNotFoundError as error:
        what = "no such file or folder" if kind is InputError else f"cannot {verb}: no such file or folder"
        raise kind(what, where=path) from error
    except IsADirectoryError as error:
        raise kind("is a folder, not a file", where=path) from error
    except OSError as error:
        raise kind(f"cannot {verb}: {error.strerror or _first(error)}", where=path) from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        # adlfs answers a missing or wrong account by a ValueError of its own.
        if library not in _NETWORK and not _raised_in(error, ("adlfs", "azure")):
            raise
        hint = _NETWORK.get(library, _NETWORK["azure"])
        raise kind(f"cannot {verb}: {_first(error)}", where=path, hint=hint) from error


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _raised_in(error: Exception, packages: tuple[str, ...]) -> bool:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = "" if last is None else str(last.tb_frame.f_globals.get("__name__", ""))
    return isinstance(error, ValueError) and name.partition(".")[0] in packages


class ToldFile(io.RawIOBase):
    """This is a remote file whose failures are one line."""

    def __init__(self, file: Any, path: str, verb: str) -> None:
        self._file, self._path, self._verb = file, path, verb

    def _call(self, name: str, *arguments: Any) -> Any:
        with one_line(self._path, self._verb):
            return getattr(self._file, name)(*arguments)

    def read(self, size: int | None = -1) -> bytes:
        return bytes(self._call("read", -1 if size is None else size))

    def readinto(self, buffer: Any) -> int:
        return int(self._call("readinto", buffer))

    def readline(self, size: int | None = -1) -> bytes:
        return bytes(self._call("readline", -1 if size is None else size))

    def write(self, data: Any) -> int:
        return int(self._call("write", data))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        if not self.closed and self.writable():
            self._call("flush")

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._call("close")

    def readable(self) -> bool:
        return bool(self._file.readable())

    def writable(self) -> bool:
        return bool(self._file.writable())

    def seekable(self) -> bool:
        return bool(self._file.seekable())
