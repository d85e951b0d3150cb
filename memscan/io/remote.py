"""This module handles object stores and the Hugging Face hub for `storage`, each through its fsspec driver.

All of them are used in the same way: a write is one put, and a read of a whole file is one request. Listings are never
cached, because other processes add files to a run while this one reads it. `STORES` holds the differences.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec

from memscan.errors import InputError, MemscanError
from memscan.io import s3
from memscan.io.faults import ToldFile

if TYPE_CHECKING:
    import pyarrow.fs


@dataclass(frozen=True)
class Store:
    """This is a kind of storage.

    Args:
        title: for people.
        package: what pip installs its driver by.
        refusal: why no run, index build or registry may be here; "" if `create` is atomic, as a lease needs it.
    """

    title: str
    package: str
    refusal: str = ""


_AZURE = Store("Azure Blob Storage", "adlfs")
_GOOGLE = Store("Google Cloud Storage", "gcsfs")
STORES: Mapping[str, Store] = {
    "s3": Store("S3", "s3fs"),  # create: If-None-Match
    "gs": _GOOGLE,  # create: ifGenerationMatch=0
    "gcs": _GOOGLE,
    "az": _AZURE,  # create: If-None-Match
    "abfs": _AZURE,
    "abfss": _AZURE,
    "hf": Store("the Hugging Face hub", "huggingface_hub", "its writes are commits, and nothing makes them exclusive"),
    "memory": Store("this process's memory", "fsspec", "other processes do not see it"),
}
# What changes with the content of an object, by the names that drivers give it; the first that is there counts.
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "lfs", "created", "last_modified", "mtime")

_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")


def scheme_of(text: str) -> str:
    """Return the scheme of a path; "" for a local one."""
    scheme, sign, _ = text.partition("://")
    return scheme if sign else ""


class RemoteFiles:
    """These are files whose paths have one scheme.

    Methods let errors of the driver pass, and `storage` makes one line of them.

    Args:
        text: any path of them; its account counts where the scheme has accounts (`abfs://CONTAINER@ACCOUNT...`).

    Raises:
        MemscanError: the driver is not installed.
    """

    def __init__(self, text: str) -> None:
        self.scheme = scheme_of(text)
        self.store = STORES[self.scheme]
        try:
            self.fs: Any = s3.client() if self.scheme == "s3" else _client(self.scheme, _account(text))
        except ImportError as error:
            raise MemscanError(
                f"reading and writing {self.scheme}:// needs {self.store.package} ({error.__cause__ or error})",
                where=text,
                hint=f"pip install {self.store.package}",
            ) from error

    def inner(self, text: str) -> str:
        """Return the path as the driver names it."""
        return str(self.fs._strip_protocol(text))

    def exists(self, text: str) -> bool:
        return self._type(text) is not None

    def is_dir(self, text: str) -> bool:
        return self._type(text) == "directory"

    def _type(self, text: str) -> str | None:
        # fsspec's own `exists` and `isdir` say no where the network is away, and a run would begin again.
        try:
            return str(self.fs.info(self.inner(text))["type"])
        except FileNotFoundError:
            return None

    def size(self, text: str) -> int:
        return int(self.fs.size(self.inner(text)))

    def find(self, text: str) -> dict[str, dict[str, Any]]:
        """Return the path below `text` -> what the store says of it."""
        root = self.inner(text).rstrip("/") + "/"
        found = self.fs.find(root, detail=True)
        wrong = next((name for name in found if not name.startswith(root)), None)
        if wrong is not None:
            raise InputError(f"the driver lists {wrong!r}, which is not below it", where=text)
        return {name.removeprefix(root): facts for name, facts in found.items()}

    def glob(self, text: str) -> list[str]:
        host, inner = text.partition("://")[2].partition("/")[0], self.inner(text)
        first = inner.lstrip("/").partition("/")[0]  # a driver leaves an account's name out
        found = (str(name).lstrip("/").removeprefix(first) for name in self.fs.glob(inner))
        return [f"{self.scheme}://{host}{name}" for name in found]

    def stamp(self, text: str, facts: Mapping[str, Any]) -> str:
        """Return the size, and the store's identifier of the content. Raises InputError if it gives none."""
        mark = next((facts[key] for key in _STAMPS if facts.get(key)), None)
        if mark is None:
            raise InputError("the store does not say whether it has changed", where=text)
        return f"{facts['size']} {mark}"

    def changed(self, text: str, facts: Mapping[str, Any]) -> float:
        """Return when an object was written, in seconds of the store's clock.

        Raises InputError if the store does not say.
        """
        at = next((facts[key] for key in _TIMES if facts.get(key)), None)
        if isinstance(at, str):
            at = datetime.fromisoformat(at)
        if isinstance(at, datetime):
            return at.timestamp()
        if at is None:
            raise InputError("the store does not say when it was written", where=text)
        return float(at)

    def open(self, text: str) -> IO[bytes]:
        return cast("IO[bytes]", ToldFile(self.fs.open(self.inner(text), "rb"), text, "read"))

    def read(self, text: str) -> bytes:
        # One request. A file object asks for the size first and then for ranges of that very version, and fails where
        # somebody replaces the object in between, as the holder of a lease does.
        return bytes(self.fs.cat_file(self.inner(text)))

    def write(self, text: str, data: bytes) -> None:
        self.fs.pipe_file(self.inner(text), data)

    def create(self, text: str, data: bytes) -> None:
        """Create an object. Raises FileExistsError if there is one."""
        self.fs.pipe_file(self.inner(text), data, mode="create")

    def put(self, local: str, text: str) -> None:
        """Move a local file there."""
        self.fs.put_file(local, self.inner(text))
        os.remove(local)

    def make_dirs(self, text: str) -> None:
        """Do nothing, because folders exist with their first file."""

    def remove(self, text: str) -> None:
        inner = self.inner(text)
        if ("/" not in inner.strip("/") and self.scheme != "memory") or not inner.strip("/"):
            raise MemscanError("refusing to remove a whole bucket", where=text)
        if self._type(text) is not None:
            self.fs.rm(inner, recursive=True)

    def arrow(self, text: str) -> tuple[pyarrow.fs.FileSystem, str]:
        import pyarrow.fs

        from memscan.io.arrow import ArrowHandler

        return pyarrow.fs.PyFileSystem(ArrowHandler(self.fs, self.scheme)), self.inner(text)


def _client(scheme: str, account: str) -> Any:
    made, _ = fsspec.core.url_to_fs(f"{scheme}://{account}", use_listings_cache=False)
    return made


def _account(text: str) -> str:
    """Return what of a path decides the client: `CONTAINER@ACCOUNT.dfs.core.windows.net`, or nothing."""
    host = text.partition("://")[2].partition("/")[0]
    return f"{host}/" if "@" in host else ""


def check_credentials(text: str) -> None:
    """Refuse a path with a user and a password, or with a signature, in it. Raises InputError."""
    scheme, host = scheme_of(text), text.partition("://")[2].partition("/")[0]
    azure = STORES.get(scheme) is _AZURE and ":" not in host and host.endswith(".core.windows.net")
    if scheme and (("@" in host and not azure) or ("?" in text and _signed(text.partition("?")[2]))):
        raise InputError(
            "credentials do not belong in a path, because it is kept in run.json and shown in reports",
            where=text,
            hint="use the store's own variables, files or instance roles",
        )


def _signed(query: str) -> bool:
    keys = {part.partition("=")[0].lower() for part in query.split("&")}
    return bool(keys & {"sig", "signature", "x-amz-signature", "x-amz-credential", "x-goog-signature", "token"})
