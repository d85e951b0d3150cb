"""This module handles an index folder: it is written in one call, opened after verification, and searched by region.

Candidates are searched by the whole image, by its foreground and by its background separately, because a search by one
of them can hide a better match of another (a copied object on a new background is far away as a whole image).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy.typing as npt
import pyarrow as pa

from memscan.errors import IndexLoadError
from memscan.index import vectors as faiss_vectors
from memscan.index.access import Resident, ShardMajor
from memscan.index.change import removed_rows
from memscan.index.choice import Choice, choose
from memscan.index.local_copy import stage_shard
from memscan.index.manifest import FORMAT, MANIFEST_FILE, Manifest
from memscan.index.references import Reference, check_ids
from memscan.index.search import Hit, ShardAccess, hits_of, nearest
from memscan.index.shards import OpenShard, write_shard, write_template
from memscan.io import storage
from memscan.models.specification import ModelSpec
from memscan.records import REGIONS

METRIC = "inner_product"
AUTO = "auto"


def write_index(
    folder: str,
    references: pa.Table,
    vectors: Mapping[str, npt.ArrayLike],
    factory: str,
    nprobe: int | None,
    embedder_spec: ModelSpec,
    segmenter_spec: ModelSpec,
    *,
    shard_rows: int | None = None,
) -> Manifest:
    """Write an index of vectors that are in memory; jobs that hold more build it shard by shard (`write_shard`).

    The same input gives the same files; the manifest is written last, so an interrupted build is not an index.

    Args:
        folder: local or s3://; an existing index is replaced.
        references: records.REFERENCES, row i belongs to row i of the vectors.
        vectors: region to unit vectors (N, D); the same regions can be searched.
        factory: FAISS factory string, or "auto".
        nprobe: default number of lists that are searched; None for that of "auto", or 16.
        embedder_spec, segmenter_spec: what made the vectors and the masks.
        shard_rows: references per shard; by default all are in one shard.

    Raises:
        InputError: references without rows, with ids that are not unique, or a factory that FAISS cannot build.
        ValueError: unknown regions, or vectors that do not fit the references or each other.
    """
    checked = _checked_vectors(vectors, references.num_rows)
    check_ids(references["reference_id"], folder)
    for name in (MANIFEST_FILE, "versions"):
        storage.remove_tree(storage.join(folder, name))
    dimension = next(iter(checked.values())).shape[1]
    chosen = settle(factory, nprobe, references.num_rows, dimension, len(checked))
    sample = faiss_vectors.training_rows(references.num_rows, chosen.factory)
    templates = {r: faiss_vectors.train(v[sample], chosen.factory, len(v)) for r, v in checked.items()}
    entries = write_template(folder, templates)
    step = shard_rows or references.num_rows
    shards = []
    for number, start in enumerate(range(0, references.num_rows, step)):
        parts = {region: partial(_rows, all_ND, start, start + step) for region, all_ND in checked.items()}
        rows = [references.slice(start, step)]
        shards.append(write_shard(folder, f"{number:05d}", rows, parts, templates.__getitem__, chosen.factory))
    manifest = Manifest(
        format=FORMAT,
        version=1,
        dimension=dimension,
        regions=tuple(checked),
        factory=chosen.factory,
        why=chosen.why,
        nprobe=chosen.nprobe,
        metric=METRIC,
        embedder=embedder_spec.id,
        segmenter=segmenter_spec.id,
        template=entries,
        shards=tuple(shards),
        source_rows=references.num_rows,
    )
    manifest.save(folder)
    return manifest


def settle(
    factory: str, nprobe: int | None, count: int, dimension: int, regions: int, memory: int | None = None
) -> Choice:
    """Return the index type that was asked for, or the one that suits ("auto")."""
    if factory == AUTO:
        chosen = choose(count, dimension, regions, memory)
        return chosen if nprobe is None else Choice(chosen.factory, nprobe, chosen.why)
    return Choice(factory, 16 if nprobe is None else nprobe, "as configured")


def _rows(vectors_ND: faiss_vectors.Vectors, start: int, stop: int) -> faiss_vectors.Vectors:
    return vectors_ND[start:stop]


def _checked_vectors(vectors: Mapping[str, npt.ArrayLike], count: int) -> dict[str, faiss_vectors.Vectors]:
    if not vectors or not set(vectors) <= set(REGIONS):
        raise ValueError(f"vectors for {sorted(vectors)}, expected {sorted(REGIONS)} or some of them")
    checked = {r: faiss_vectors.check_vectors(vectors[r], r) for r in REGIONS if r in vectors}
    shapes = {region: vectors_ND.shape for region, vectors_ND in checked.items()}
    if len(set(shapes.values())) != 1 or any(len(vectors_ND) != count for vectors_ND in checked.values()):
        raise ValueError(f"vectors of shapes {shapes} for {count} references")
    return checked


class ReferenceIndex:
    """This is an open version of an index. It is made by `open`, and is not safe for several threads."""

    def __init__(self, folder: str, manifest: Manifest, access: ShardAccess) -> None:
        self.folder, self.manifest, self._access = folder, manifest, access

    @classmethod
    def open(
        cls,
        folder: str,
        embedder_spec: ModelSpec | None,
        nprobe: int | None = None,
        *,
        version: int | None = None,
        verify: Literal["hash", "size", "once"] = "hash",
        access: Literal["resident", "shard-major"] = "resident",
        device: str = "cpu",
    ) -> ReferenceIndex:
        """Open an index folder.

        Args:
            folder: local, or s3://, which is copied to this machine's disk first.
            embedder_spec: of the embedder whose vectors will be searched for; None if the caller has checked it.
            nprobe: number of lists to search, if the index has lists; by default as built.
            version: of the index; by default the current one.
            verify: "hash" reads every file before it is parsed; "once" only if this machine has not done so before;
                "size" if the caller knows that it has.
            access: all shards open at once, or one after another.
            device: "cuda" to search on a GPU if faiss-gpu is installed and the type of index allows it.

        Raises:
            IndexLoadError: there is no index, it has another format or another embedder, or its parts disagree.
            IntegrityError: a file is missing, truncated or altered; checked before FAISS or pyarrow read it.
            MemscanError: an index on s3:// does not fit on this machine's disk.
        """
        manifest = Manifest.load(folder, version)
        if embedder_spec is not None:
            check_embedder(folder, manifest, embedder_spec)
        local = not storage.is_remote(folder)
        if local and verify != "once":
            manifest.verify(folder, verify)
        lists = manifest.nprobe if nprobe is None else nprobe
        removed = removed_rows(folder, manifest)
        if access == "shard-major":
            return cls(folder, manifest, ShardMajor(folder, manifest, lists, removed))
        if local and verify == "once":
            manifest.verify(folder, "size")
        shards = []
        for at, (shard, start) in enumerate(zip(manifest.shards, manifest.starts(), strict=False)):
            in_place = local and verify != "once"
            place = storage.join(folder, "shards", shard.name) if in_place else stage_shard(folder, shard)
            shards.append(OpenShard(place, manifest, shard, start, lists, removed[at], device))
            shards[-1].load()
        return cls(folder, manifest, Resident(shards))

    def __len__(self) -> int:
        return self.manifest.count

    def search(self, vectors: Mapping[str, npt.ArrayLike], top_k: int) -> list[list[Hit]]:
        """Return the candidates of each query: the union of the `top_k` nearest by each given region.

        The most similar ones come first.

        Equal similarities are ordered by row. A region is not searched if it is left out, or if the index lacks it.

        Args:
            vectors: region to unit vectors (N, D), row i of each belonging to one query.
            top_k: per region; more than the index holds gives all of it.

        Raises:
            ValueError: no or unknown regions, other shapes, vectors that are not finite and of unit length, top_k < 1.
        """
        return hits_of(self._access, self.nearest(vectors, top_k))

    def nearest(self, vectors: Mapping[str, npt.ArrayLike], top_k: int) -> dict[str, faiss_vectors.Answer]:
        """Return, by region, rows (N, top_k) and cosines (N, top_k) of the nearest references.

        See `search` and `Answer`.
        """
        if not vectors or not set(vectors) <= set(REGIONS) or top_k < 1:
            raise ValueError(f"cannot search regions {sorted(vectors)} with top_k {top_k}")
        queries = {r: faiss_vectors.check_vectors(vectors[r], r) for r in self.manifest.regions if r in vectors}
        if not queries:
            raise ValueError(f"cannot search regions {sorted(vectors)}: the index has {self.manifest.regions}")
        shapes = {q.shape for q in queries.values()}
        if len(shapes) != 1 or next(iter(shapes))[1] != self.manifest.dimension:
            raise ValueError(f"queries of shapes {sorted(shapes)} for vectors of length {self.manifest.dimension}")
        if next(iter(shapes))[0] == 0:
            return {region: faiss_vectors.empty_answer(0, top_k) for region in queries}
        return nearest(self._access, self.manifest, queries, top_k)

    def fetch(self, row: int) -> Reference:
        """Return a reference with its image. Raises RowReject (`reference_missing`); see `ReferenceStore.fetch`."""
        if not 0 <= row < self.manifest.rows:
            raise IndexError(f"row {row} of {self.manifest.rows} references")
        return self._access.fetch(row)


def check_embedder(folder: str, manifest: Manifest, embedder_spec: ModelSpec) -> None:
    """Raise IndexLoadError, naming both, where an index was made by another embedder."""
    if manifest.embedder != embedder_spec.id:
        raise IndexLoadError(
            f"the index was built with embedder {manifest.embedder}, the configuration has {embedder_spec.id}",
            where=folder,
            hint="configure that embedder, or build the index again",
        )
