"""One shard of an index: written once, never changed, searched on its own.

All shards are copies of one trained template. Only then are their similarities those of one index, and the union of
their answers the answer of the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memscan import storage
from memscan.index import vectors as faiss_vectors
from memscan.index.choice import is_compressed
from memscan.index.manifest import REFERENCES_FILE, FileEntry, Manifest, Shard, describe, exact_file, vector_file
from memscan.index.references import ReferenceStore, write_references

Half = npt.NDArray[np.float16]


def write_template(folder: str, templates: Mapping[str, Any]) -> dict[str, FileEntry]:
    """Write the trained, empty indexes by region."""
    with tempfile.TemporaryDirectory() as scratch:
        for region, template in templates.items():
            faiss_vectors.write(str(Path(scratch) / vector_file(region)), template)
        return _move_all(Path(scratch), storage.join(folder, "template"))


def read_templates(folder: str, manifest: Manifest) -> dict[str, Any]:
    """The trained, empty indexes of a verified local folder, by region."""
    return {
        region: faiss_vectors.read(
            storage.join(folder, "template", vector_file(region)), manifest.factory, mapped=False
        )
        for region in manifest.regions
    }


def write_shard(
    folder: str,
    name: str,
    references: Iterable[pa.Table],
    vectors: Mapping[str, Callable[[], faiss_vectors.Vectors]],
    templates: Mapping[str, Any],
    factory: str,
) -> Shard:
    """Write one shard, one region in memory at a time.

    Args:
        folder: of the index, local or s3://.
        references: tables of records.REFERENCES, in the order of the vectors.
        vectors: by region, what gives the unit vectors (N, D).
        templates: by region, trained and empty.

    Raises:
        InputError: the tables are not references.
        ValueError: another number of vectors than of references, or vectors that are not finite and of unit length.
    """
    with tempfile.TemporaryDirectory() as scratch:
        count, first, last = write_references(str(Path(scratch) / REFERENCES_FILE), references)
        for region, load in vectors.items():
            vectors_ND = faiss_vectors.check_vectors(load(), region)
            if len(vectors_ND) != count:
                raise ValueError(f"{region}: {len(vectors_ND)} vectors for {count} references")
            faiss_vectors.write(
                str(Path(scratch) / vector_file(region)), faiss_vectors.filled(templates[region], vectors_ND)
            )
            if is_compressed(factory):
                np.save(Path(scratch) / exact_file(region), vectors_ND.astype(np.float16))
        files = _move_all(Path(scratch), storage.join(folder, "shards", name))
    return Shard(name, count, first, last, files)


def _move_all(scratch: Path, target: str) -> dict[str, FileEntry]:
    files = {}
    for file in sorted(scratch.iterdir()):
        files[file.name] = describe(str(file))
        storage.move_in(file, storage.join(target, file.name))
    return files


@dataclass(frozen=True)
class OpenShard:
    """A shard that can be searched.

    Attributes:
        start: row of its first reference in the whole index.
        indexes: FAISS index by region.
        exact: half precision vectors (N, D) by region, mapped from disk; empty where similarities are exact already.
    """

    start: int
    indexes: Mapping[str, Any]
    exact: Mapping[str, Half]
    references: ReferenceStore

    @classmethod
    def open(cls, folder: str, manifest: Manifest, shard: Shard, nprobe: int) -> OpenShard:
        """Open a shard of a verified local folder. Raises IndexLoadError where a part is not what it should be."""
        place = storage.join(folder, "shards", shard.name)
        exact = {}
        if is_compressed(manifest.factory):
            exact = {r: np.load(storage.join(place, exact_file(r)), mmap_mode="r") for r in manifest.regions}
        start = 0
        for other in manifest.shards:
            if other.name == shard.name:
                break
            start += other.count
        return cls(
            start,
            {
                r: faiss_vectors.read(storage.join(place, vector_file(r)), manifest.factory, nprobe)
                for r in manifest.regions
            },
            exact,
            ReferenceStore(storage.join(place, REFERENCES_FILE)),
        )

    def candidates(
        self, region: str, queries_ND: faiss_vectors.Vectors, k: int
    ) -> list[tuple[faiss_vectors.Rows, faiss_vectors.Vectors]]:
        """The `k` nearest of each query: rows of the whole index and similarities, approximate where compressed."""
        index = self.indexes[region]
        if region not in self.exact:
            found = faiss_vectors.search(index, queries_ND, k)
        else:
            # Codes of a few bytes tie by the hundred; the exact ranking afterwards makes their order irrelevant.
            similarities, rows = index.search(queries_ND, min(k, index.ntotal))
            found = [(r[r >= 0], s[r >= 0]) for r, s in zip(rows, similarities, strict=True)]
        return [(rows + self.start, similarities) for rows, similarities in found]

    def similarities(
        self, region: str, rows: faiss_vectors.Rows, query_D: faiss_vectors.Vectors
    ) -> faiss_vectors.Vectors:
        """Exact similarities (to half precision) of rows of this shard to one query."""
        stored = np.asarray(self.exact[region][rows - self.start], dtype=np.float32)
        result: faiss_vectors.Vectors = stored @ query_D
        return result
