"""This module handles one shard of an index, which is written once, never changed, and searched on its own.

All shards are copies of one trained template. Therefore their similarities are comparable, and the union of
their answers is the answer of the whole index.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memscan.errors import IndexLoadError
from memscan.index import vectors as faiss_vectors
from memscan.index.choice import is_compressed
from memscan.index.halves import Halves
from memscan.index.manifest import (
    IDS_FILE,
    REFERENCES_FILE,
    FileEntry,
    Manifest,
    Shard,
    describe,
    exact_file,
    vector_file,
)
from memscan.index.references import ReferenceStore, map_ids, write_ids, write_references
from memscan.index.vectors import Answer, Lists, Rows, Vectors
from memscan.io import storage


def write_template(folder: str, templates: Mapping[str, Any]) -> dict[str, FileEntry]:
    """Write trained, empty indexes by region."""
    with tempfile.TemporaryDirectory() as scratch:
        for region, template in templates.items():
            faiss_vectors.write(str(Path(scratch) / vector_file(region)), template)
        return _move_all(Path(scratch), storage.join(folder, "template"))


def read_template(local: str, region: str, factory: str) -> Any:
    """Return the trained, empty index of one region, out of a verified local folder."""
    return faiss_vectors.read(storage.join(local, "template", vector_file(region)), factory, mapped=False)


def write_shard(
    folder: str,
    name: str,
    references: Iterable[pa.Table],
    vectors: Mapping[str, Callable[[], Vectors]],
    template: Callable[[str], Any],
    factory: str,
) -> Shard:
    """Write one shard, one region in memory at a time.

    Args:
        folder: of the index, local or s3://.
        references: tables of records.REFERENCES, in the order of the vectors.
        vectors: by region, what gives the unit vectors (N, D).
        template: gives a region's trained, empty index.

    Raises:
        InputError: the tables are not references.
        ValueError: another number of vectors than of references, or vectors that are not finite and of unit length.
    """
    target = storage.join(folder, "shards", name)
    with _scratch(target) as scratch:
        ids = write_references(str(scratch / REFERENCES_FILE), references)
        write_ids(str(scratch / IDS_FILE), ids)
        for region, load in vectors.items():
            vectors_ND = faiss_vectors.check_vectors(load(), region)
            if len(vectors_ND) != len(ids):
                raise ValueError(f"{region}: {len(vectors_ND)} vectors for {len(ids)} references")
            faiss_vectors.write(str(scratch / vector_file(region)), faiss_vectors.filled(template(region), vectors_ND))
            if is_compressed(factory):
                Halves.write(str(scratch / exact_file(region)), vectors_ND)
        files = _move_all(scratch, target)
    return Shard(name, len(ids), ids[0].as_py(), ids[-1].as_py(), files)


@contextmanager
def _scratch(target: str) -> Iterator[Path]:
    """Give a folder on the disk that the shard will lie on, so that it need not be copied; elsewhere for s3://."""
    parent = None
    if not storage.is_remote(target):
        parent = str(Path(target).parent)
        os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=parent) as scratch:
        yield Path(scratch)


def _move_all(scratch: Path, target: str) -> dict[str, FileEntry]:
    files = {}
    for file in sorted(scratch.iterdir()):
        files[file.name] = describe(str(file))
        storage.move_in(file, storage.join(target, file.name))
    return files


@dataclass(frozen=True)
class OpenShard:
    """This is a shard in a local folder that has been verified. Each file is opened when it is first needed.

    Attributes:
        place: its folder.
        start: row of its first reference in the whole index.
        nprobe: lists that a search looks into.
        removed: rows of this shard that are in no answer, ascending, counted from 0.
        device: "cuda" for search on a GPU, where that is possible.
    """

    place: str
    manifest: Manifest
    shard: Shard
    start: int
    nprobe: int
    removed: Rows
    device: str = "cpu"
    _indexes: dict[str, Any] = field(default_factory=dict, repr=False)
    _exact: dict[str, Halves] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.shard.count

    def index(self, region: str) -> Any:
        """Return the FAISS index of a region. Raises IndexLoadError if it is not what the manifest says."""
        if region not in self._indexes:
            path = storage.join(self.place, vector_file(region))
            on_gpu = self.device == "cuda"
            index = faiss_vectors.read(path, self.manifest.factory, self.nprobe, mapped=not on_gpu)
            self._check(region, index.ntotal)
            if index.d != self.manifest.dimension:
                raise IndexLoadError(
                    f"{region}: vectors of length {index.d}, not {self.manifest.dimension}", where=path
                )
            self._indexes[region] = faiss_vectors.to_device(index, self.device)
        return self._indexes[region]

    def exact(self, region: str) -> Halves:
        """Return half precision vectors of a region of a compressed index. Raises IndexLoadError as `index`."""
        if region not in self._exact:
            halves = Halves(storage.join(self.place, exact_file(region)))
            self._check(f"{region} in half precision", len(halves))
            self._exact[region] = halves
        return self._exact[region]

    @cached_property
    def ids(self) -> pa.Array:
        """Return ids by row, mapped from disk. Raises IndexLoadError as `index`."""
        ids = map_ids(storage.join(self.place, IDS_FILE))
        self._check("the table of ids", len(ids))
        return ids

    def open_references(self) -> ReferenceStore:
        """Return the images; what holds it should not hold hundreds."""
        return ReferenceStore(storage.join(self.place, REFERENCES_FILE))

    def load(self) -> None:
        """Open everything that a search needs, so that what is wrong is found now."""
        for region in self.manifest.regions:
            self.index(region)
            if is_compressed(self.manifest.factory):
                self.exact(region)
        _ = self.ids

    def lists(self, region: str, queries_ND: Vectors) -> Lists | None:
        """Return where to look for the queries, in this shard and all others; see `vectors.find_lists`."""
        return faiss_vectors.find_lists(self.index(region), queries_ND)

    def candidates(self, region: str, queries_ND: Vectors, k: int, lists: Lists | None = None) -> Answer:
        """Return the `k` nearest of each query: rows of the whole index, and similarities.

        Similarities of a compressed index are approximate.
        """
        ties = not self.manifest.factory.endswith("fsr") and not self.manifest.factory.endswith("fs")
        rows, similarities = faiss_vectors.search(
            self.index(region), queries_ND, k, self.removed, ties=ties, lists=lists
        )
        return np.where(rows < 0, -1, rows + self.start), similarities

    def rank(self, region: str, rows_NK: Rows, queries_ND: Vectors) -> Vectors:
        """Return exact similarities (to half precision) of those rows (N, K) that are in this shard.

        They are -inf for the other rows.
        """
        return self.exact(region).similarities(rows_NK - self.start, queries_ND)

    def vectors(self, region: str) -> Vectors:
        """Return all unit vectors of a region: as they were given or, of a compressed index, to half precision."""
        if is_compressed(self.manifest.factory):
            return self.exact(region).unit()
        path = storage.join(self.place, vector_file(region))
        return faiss_vectors.stored(faiss_vectors.read(path, self.manifest.factory, mapped=False))

    def _check(self, part: str, held: int) -> None:
        """Files whose hashes hold may still never have been one shard."""
        if held != self.shard.count:
            raise IndexLoadError(f"{part} holds {held} rows, the manifest says {self.shard.count}", where=self.place)
