"""The S3 client behind `storage`: how often it tries, how long it waits, and what is said when it gives up.

S3 answers 503 under load, drops connections and cuts answers short. A request is tried `ATTEMPTS` times with growing,
random pauses (botocore's standard mode: 1, 2, 4, ... at most 20 s, each times a random number), and an answer that
breaks off while it is read is asked for again `ROUNDS` times. A server that never answers is given up after
READ_SECONDS x ATTEMPTS x ROUNDS, ten minutes. What is left over then is one line that names the object, also where
the reader is pyarrow (`s3_arrow.py`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memscan.errors import InputError, MemscanError

ATTEMPTS = 6
ROUNDS = 5
CONNECT_SECONDS = 10
READ_SECONDS = 20
# Libraries whose exceptions are the network's or the server's, where they are not OSErrors.
_NETWORK = ("botocore", "aiobotocore", "aiohttp", "http", "fsspec")
_READS = ("read", "list")


def client() -> Any:
    """An s3fs file system with the credentials and the endpoint that AWS's own variables and files name.

    AWS_MAX_ATTEMPTS and AWS_RETRY_MODE count where they are set.

    Raises:
        MemscanError: the `s3` extra is not installed.
    """
    try:
        import s3fs
    except ImportError as error:
        raise MemscanError(
            "reading and writing s3:// needs the `s3` extra", where="s3", hint="pip install s3fs"
        ) from error
    settings: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        settings["retries"] = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    # Without the listings cache: other processes add files to a run while this one looks at it.
    made = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=settings)
    made.retries = ROUNDS
    return made


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
        raise kind(f"cannot {verb}: {error.strerror or error or type(error).__name__}", where=path) from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in _NETWORK:
            raise
        hint = "check the AWS credentials and endpoint" if library == "botocore" else None
        raise kind(f"cannot {verb}: {error or type(error).__name__}", where=path, hint=hint) from error


class Told(io.RawIOBase):
    """A file on S3 whose failures are one line."""

    def __init__(self, file: Any, path: str, verb: str) -> None:
        self._file, self._path, self._verb = file, path, verb

    def read(self, size: int | None = -1) -> bytes:
        with one_line(self._path, self._verb):
            return bytes(self._file.read(-1 if size is None else size))

    def readinto(self, buffer: Any) -> int:
        with one_line(self._path, self._verb):
            return int(self._file.readinto(buffer))

    def readline(self, size: int | None = -1) -> bytes:
        with one_line(self._path, self._verb):
            return bytes(self._file.readline(-1 if size is None else size))

    def write(self, data: Any) -> int:
        with one_line(self._path, self._verb):
            return int(self._file.write(data))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        if not self.closed and self.writable():
            with one_line(self._path, self._verb):
                self._file.flush()

    def close(self) -> None:
        if not self.closed:
            super().close()
            with one_line(self._path, self._verb):
                self._file.close()

    def readable(self) -> bool:
        return bool(self._file.readable())

    def writable(self) -> bool:
        return bool(self._file.writable())

    def seekable(self) -> bool:
        return bool(self._file.seekable())
