"""The manifest of an index folder: what it holds, for which models, and the size and hash of every file.

It is written last and read first. No file of an index is given to a parser before its bytes are the promised ones: a
damaged or forged FAISS file can corrupt memory, and a silently short one makes copies look original.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

from memscan import storage
from memscan.errors import IndexLoadError, InputError, IntegrityError
from memscan.records import REGIONS

FORMAT = 1
MANIFEST_FILE = "manifest.json"
REFERENCES_FILE = "references.parquet"

Verify = Literal["hash", "size"]


def vector_file(region: str) -> str:
    """Name of a region's FAISS file."""
    return f"{region}.faiss"


FILES = (*(vector_file(region) for region in REGIONS), REFERENCES_FILE)


@dataclass(frozen=True)
class FileEntry:
    """A file's promised size in bytes and SHA-256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json.

    Attributes:
        count, dimension: number of references (rows) and length of a vector.
        factory, nprobe, metric: of the FAISS indexes; `nprobe` is the default of a search.
        embedder, segmenter: ids of the specifications that made the vectors and the masks.
        files: the other files of the folder.
    """

    format: int
    count: int
    dimension: int
    factory: str
    nprobe: int
    metric: str
    embedder: str
    segmenter: str
    files: dict[str, FileEntry]

    @property
    def hash(self) -> str:
        """One hash for the whole index (16 hex digits): of the sizes and hashes of its files and its specifications."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, folder: str) -> None:
        """Write the manifest into its folder; this makes the folder an index."""
        storage.write_json(storage.join(folder, MANIFEST_FILE), dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str) -> Manifest:
        """Read a folder's manifest.

        Raises:
            IndexLoadError: there is none, it is no manifest, or it is of another format version.
        """
        path = storage.join(folder, MANIFEST_FILE)
        if not storage.exists(path):
            raise IndexLoadError("no index here (manifest.json is missing)", where=folder, hint="build one first")
        try:
            data = storage.read_json(path)
        except InputError as error:
            raise IndexLoadError(error.what, where=path, hint="build the index again") from error
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise IndexLoadError(f"index format {data.get('format')!r}, this version reads {FORMAT}", where=path)
        try:
            files = {str(name): FileEntry(int(e["bytes"]), str(e["sha256"])) for name, e in data["files"].items()}
            manifest = cls(**{**data, "files": files})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise IndexLoadError(
                f"not an index manifest ({error})", where=path, hint="build the index again"
            ) from error
        if set(manifest.files) != set(FILES) or not isinstance(manifest.count, int):
            raise IndexLoadError(f"not an index manifest (files {sorted(manifest.files)})", where=path)
        return manifest

    def verify(self, folder: str, how: Verify = "hash") -> None:
        """Check that every file is there with the promised size, then that it has the promised content.

        Args:
            how: "hash" reads every byte; "size" is for a process whose machine has verified the same files before.

        Raises:
            IntegrityError: names the first file that is missing, truncated or altered.
        """
        if how not in get_args(Verify):
            raise ValueError(f"verify is one of {get_args(Verify)}, not {how!r}")
        for name, entry in self.files.items():
            path = storage.join(folder, name)
            if not storage.exists(path):
                raise IntegrityError(
                    "file of the index is missing", where=path, hint="restore it or build the index again"
                )
            size = storage.file_size(path)
            if size != entry.bytes:
                raise IntegrityError(
                    f"{size} bytes, the manifest promises {entry.bytes}",
                    where=path,
                    hint="the file is truncated or another one: restore it or build the index again",
                )
        if how == "hash":
            for name, entry in self.files.items():
                storage.verify_sha256(storage.join(folder, name), entry.sha256)


def describe(folder: str, name: str) -> FileEntry:
    """Size and hash of a file that has just been written."""
    path = storage.join(folder, name)
    return FileEntry(storage.file_size(path), storage.sha256_file(path))
