"""This module holds the manifest of an index folder: its content, its models, and the size and hash of every file.

    versions/000001.json          every version, as it was; the highest one counts (`io/register.py`)
    manifest.json                 a copy of it: what is read first, and the mark of a finished build
    template/whole.faiss ...      the trained, empty index that all shards are copies of
    shards/NAME/whole.faiss foreground.faiss background.faiss [whole.f16.npy ...] references.parquet ids.arrow
    removed/000002.parquet        ids that a version leaves out of every answer

Files are never changed, so a version stays what it was while another one is made; a census names the version it uses.
A version is made by compare-and-swap: of two changes at once one becomes the next version, and the other one is made
again on top of it (`change.py`). The manifest is written last and read first. No file of an index is given to a parser
before its bytes are the promised ones: a damaged or forged FAISS file can corrupt memory, and a silently short one
makes copies look original.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from memscan.errors import IndexLoadError, InputError, IntegrityError, RunError
from memscan.io import storage
from memscan.io.register import Register
from memscan.records import REGIONS

FORMAT = 2
MANIFEST_FILE = "manifest.json"
REFERENCES_FILE = "references.parquet"
IDS_FILE = "ids.arrow"
REJECTS_FILE = "rejects.parquet"  # of the build, beside the index; no part of it

Verify = Literal["hash", "size"]


def vector_file(region: str) -> str:
    """Return the name of a region's FAISS file."""
    return f"{region}.faiss"


def exact_file(region: str) -> str:
    """Return the name of a region's half precision vectors, which answers of a compressed index are ranked again by."""
    return f"{region}.f16.npy"


_CHECKED = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileEntry:
    """This is a file's promised size in bytes and its SHA-256 (hex)."""

    __pydantic_config__ = _CHECKED

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Shard:
    """A shard is a part of an index.

    Attributes:
        name: of its folder below shards/.
        count: references in it; their rows follow those of the shards before it.
        first_id, last_id: of its first and last reference, in the order of the source.
        files: by name.
    """

    __pydantic_config__ = _CHECKED

    name: str
    count: Count
    first_id: str
    last_id: str
    files: Mapping[str, FileEntry]


@dataclass(frozen=True)
class Manifest:
    """This is the content of manifest.json.

    Attributes:
        version: counts the changes of an index, from 1.
        dimension: length of a vector.
        regions: that can be searched: all three, or those that ready embeddings were given for.
        factory, why: of the FAISS indexes, and the reason for it in one sentence.
        nprobe: default of a search.
        embedder, segmenter: ids of the specifications that made the vectors and the masks.
        template: files of the trained, empty indexes.
        removed: file of the ids that are left out, and their number; None and 0 for none.
        recall: recall@k of queries at build time, by "region@k"; empty if it was not measured.
        sources: how the source of the build and of each addition was read (`inspection.source_facts`); empty if an
            index was built before this was kept. It is no part of the hash.
        source_rows, rejected: references that went into the build and later additions, and those that were rejected.
    """

    __pydantic_config__ = _CHECKED

    format: int
    version: Annotated[int, Field(ge=1, le=10**6)]
    dimension: Annotated[int, Field(ge=1, le=2**20)]
    regions: tuple[str, ...]
    factory: str
    why: str
    nprobe: Annotated[int, Field(ge=1, le=2**31)]
    metric: str
    embedder: str
    segmenter: str
    template: Mapping[str, FileEntry]
    shards: tuple[Shard, ...]
    removed_file: str | None = None
    removed_entry: FileEntry | None = None
    removed_count: Count = 0
    recall: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source_rows: Count = 0
    rejected: Count = 0
    sources: tuple[Mapping[str, Any], ...] = ()

    @property
    def rows(self) -> int:
        """This is the number of references in the shards, removed ones included."""
        return sum(shard.count for shard in self.shards)

    @property
    def count(self) -> int:
        """This is the number of references that can be found."""
        return self.rows - self.removed_count

    @property
    def bytes(self) -> int:
        """Return the size of all files."""
        return sum(entry.bytes for _, entry in self.files())

    @property
    def hash(self) -> str:
        """This is one hash for this version (16 hex digits).

        It covers the sizes and hashes of its files and its specifications.
        """
        facts = dataclasses.asdict(self)
        del facts["sources"]  # says nothing of the files: an index from before it was kept has the same hash
        content = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def files(self) -> Iterator[tuple[str, FileEntry]]:
        """Yield every file but the manifest, by its path in the folder."""
        for name, entry in self.template.items():
            yield f"template/{name}", entry
        for shard in self.shards:
            for name, entry in shard.files.items():
                yield f"shards/{shard.name}/{name}", entry
        if self.removed_file and self.removed_entry:
            yield self.removed_file, self.removed_entry

    def starts(self) -> list[int]:
        """This is the row of each shard's first reference in the whole index, and at the end the number of rows."""
        return [0, *itertools.accumulate(shard.count for shard in self.shards)]

    def reference_files(self, folder: str) -> list[str]:
        """Return paths of the shards' tables of references."""
        return [storage.join(folder, "shards", shard.name, REFERENCES_FILE) for shard in self.shards]

    def save(self, folder: str) -> None:
        """Make this version the one that counts, as `swap` does.

        Raises:
            RunError: another process has made this version, or a later one, in the meantime.
        """
        if not self.swap(folder):
            raise RunError(
                f"version {self.version} was made by somebody else meanwhile", where=folder, hint="run it again"
            )

    def swap(self, folder: str) -> bool:
        """Make this version the one that counts, if the version before it still is; whether that was so.

        Raises:
            MemscanError: the place cannot be written.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False).encode() + b"\n"
        if not versions(folder).swap(self.version - 1, text):
            return False
        storage.write_atomic(storage.join(folder, MANIFEST_FILE), text)
        return True

    @classmethod
    def load(cls, folder: str, version: int | None = None) -> Manifest:
        """Read a folder's manifest: the version that counts, or another one that is still there.

        Raises:
            IndexLoadError: there is none, it is not a manifest, or it has another format version.
        """
        path = storage.join(folder, MANIFEST_FILE) if version is None else version_file(folder, version)
        if not storage.exists(path):
            what = "no index here (manifest.json is missing)" if version is None else f"has no version {version}"
            raise IndexLoadError(what, where=folder, hint="build one first" if version is None else None)
        manifest = cls._read(path)
        # The copy is written after the version, by several at once in any order, or not at all by one that was killed.
        if version is None and (latest := current(folder)) > manifest.version:
            return cls._read(version_file(folder, latest))
        return manifest

    @classmethod
    def _read(cls, path: str) -> Manifest:
        hint = "`memscan index verify --repair` goes back to the last good version, if there is one"
        try:
            return cls._parse(storage.read_json(path))
        except InputError as error:
            raise IndexLoadError(error.what, where=path, hint=hint) from error
        except (ValueError, RecursionError) as error:  # pydantic's is a ValueError
            raise IndexLoadError(f"not an index manifest ({_first(error)})", where=path, hint=hint) from error

    @classmethod
    def _parse(cls, data: Any) -> Manifest:
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise InputError(f"index format {data.get('format')!r}, this version reads {FORMAT}")
        manifest = _parser().validate_python(data)
        if not manifest.regions or not set(manifest.regions) <= set(REGIONS):
            raise ValueError(f"regions {manifest.regions}")
        for shard in manifest.shards:
            needed = {vector_file(region) for region in manifest.regions} | {REFERENCES_FILE, IDS_FILE}
            if not needed <= set(shard.files) or "/" in shard.name or shard.name.startswith("."):
                raise ValueError(f"shard {shard.name!r} with files {sorted(shard.files)}")
        for name, _ in manifest.files():
            if not storage.is_inner(name):
                raise ValueError(f"a file of the name {name!r}")
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
        for name, entry in self.files():
            verify_file(storage.join(folder, name), entry, "size")
        if how == "hash":
            for name, entry in self.files():
                verify_file(storage.join(folder, name), entry, "hash")


def verify_file(path: str, entry: FileEntry, how: Verify = "hash") -> None:
    """Check one file of an index. Raises IntegrityError as `Manifest.verify`."""
    if not storage.exists(path):
        raise IntegrityError("file of the index is missing", where=path, hint="restore it or build the index again")
    size = storage.file_size(path)
    if size != entry.bytes:
        raise IntegrityError(
            f"{size} bytes, but the manifest says {entry.bytes}",
            where=path,
            hint="the file is truncated or was replaced: restore it or build the index again",
        )
    if how == "hash":
        storage.verify_sha256(path, entry.sha256)


def version_file(folder: str, version: int) -> str:
    """Return the path of one version's manifest."""
    return versions(folder).file(version)


def versions(folder: str) -> Register:
    """Return the register of an index's versions."""
    return Register(storage.join(folder, "versions"))


def current(folder: str) -> int:
    """Return the number of the version that counts; 0 for none. Reads no manifest, so that damage is no obstacle."""
    return versions(folder).latest()


def describe(path: str) -> FileEntry:
    """Return the size and hash of a file that has just been written."""
    return FileEntry(storage.file_size(path), storage.sha256_file(path))


@functools.cache
def _parser() -> TypeAdapter[Manifest]:
    """Checks kinds and ranges of every field; unknown ones are refused."""
    return TypeAdapter(Manifest)


def _first(error: Exception) -> str:
    """Return the first thing that pydantic has to say, with its place; what another exception says."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:200]
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}"[:200]
