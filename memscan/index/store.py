"""An index folder as one thing: written in one call, opened after verification, searched by all three regions.

    manifest.json  whole.faiss  foreground.faiss  background.faiss  references.parquet

Candidates are searched by the whole image, by its foreground and by its background separately, because a search by one
of them can hide a better match of another (a copied object on a new background is far away as a whole image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memscan import storage
from memscan.errors import IndexLoadError
from memscan.index import vectors as faiss_vectors
from memscan.index.manifest import (
    FILES,
    FORMAT,
    MANIFEST_FILE,
    REFERENCES_FILE,
    Manifest,
    Verify,
    describe,
    vector_file,
)
from memscan.index.references import Reference, ReferenceStore, write_references
from memscan.models.specification import ModelSpec
from memscan.records import REGIONS

METRIC = "inner_product"


@dataclass(frozen=True)
class Hit:
    """A candidate: a reference near the query in at least one region.

    Attributes:
        row: in references.parquet.
        found_by: the regions whose search returned it, joined by "+", in the order whole, foreground, background.
        similarity: cosine, the best of those regions.
        similarities: cosine by region, for the regions in `found_by` only.
    """

    row: int
    reference_id: str
    found_by: str
    similarity: float
    similarities: Mapping[str, float]


def nearest_whole(hits: Sequence[Hit]) -> float:
    """Cosine of the whole image to its nearest reference; -1 where no hit was found by the whole image."""
    return max((hit.similarities["whole"] for hit in hits if "whole" in hit.similarities), default=-1.0)


def write_index(
    folder: str,
    references: pa.Table,
    vectors: Mapping[str, npt.ArrayLike],
    factory: str,
    nprobe: int,
    embedder_spec: ModelSpec,
    segmenter_spec: ModelSpec,
) -> Manifest:
    """Write an index. The same input gives the same files; the manifest comes last, so a broken-off build is no index.

    Args:
        folder: local or s3://; an index that is there is replaced.
        references: records.REFERENCES, row i belongs to row i of the vectors.
        vectors: region (whole, foreground, background) to unit vectors (N, D).
        factory: FAISS factory string.
        nprobe: default number of lists that a search looks into.
        embedder_spec, segmenter_spec: what made the vectors and the masks.

    Raises:
        InputError: references without rows, with ids that are not unique, or a factory that FAISS cannot build.
        ValueError: a region is missing, or vectors do not fit the references or each other.
    """
    checked = _checked_vectors(vectors, references.num_rows)
    storage.make_dirs(folder)
    storage.remove_tree(storage.join(folder, MANIFEST_FILE))
    write_references(storage.join(folder, REFERENCES_FILE), references)
    for region, vectors_ND in checked.items():
        faiss_vectors.write(storage.join(folder, vector_file(region)), faiss_vectors.build(vectors_ND, factory))
    manifest = Manifest(
        format=FORMAT,
        count=references.num_rows,
        dimension=checked[REGIONS[0]].shape[1],
        factory=factory,
        nprobe=nprobe,
        metric=METRIC,
        embedder=embedder_spec.id,
        segmenter=segmenter_spec.id,
        files={name: describe(folder, name) for name in FILES},
    )
    manifest.save(folder)
    return manifest


def _checked_vectors(vectors: Mapping[str, npt.ArrayLike], count: int) -> dict[str, faiss_vectors.Vectors]:
    if set(vectors) != set(REGIONS):
        raise ValueError(f"vectors for {sorted(vectors)}, expected {sorted(REGIONS)}")
    checked = {region: faiss_vectors.check_vectors(vectors[region], region) for region in REGIONS}
    shapes = {region: vectors_ND.shape for region, vectors_ND in checked.items()}
    if len(set(shapes.values())) != 1 or len(checked[REGIONS[0]]) != count:
        raise ValueError(f"vectors of shapes {shapes} for {count} references")
    return checked


class ReferenceIndex:
    """An open index. Made by `open`; not safe for several threads."""

    def __init__(self, folder: str, manifest: Manifest, regions: Mapping[str, Any], references: ReferenceStore) -> None:
        self.folder, self.manifest, self.references = folder, manifest, references
        self._regions = regions

    @classmethod
    def open(
        cls, folder: str, embedder_spec: ModelSpec, nprobe: int | None = None, *, verify: Verify = "hash"
    ) -> ReferenceIndex:
        """Open an index folder.

        Args:
            folder: local or s3://.
            embedder_spec: of the embedder whose vectors will be searched for.
            nprobe: lists to search, where the index has lists; default as built.
            verify: "hash" reads every file before it is parsed; "size" where this machine has done so already.

        Raises:
            IndexLoadError: no index here, of another format, of another embedder, or its parts disagree.
            IntegrityError: a file is missing, truncated or altered; checked before FAISS or pyarrow read it.
        """
        manifest = Manifest.load(folder)
        if manifest.embedder != embedder_spec.id:
            raise IndexLoadError(
                f"the index was built with embedder {manifest.embedder}, the configuration has {embedder_spec.id}",
                where=folder,
                hint="configure that embedder, or build the index again",
            )
        manifest.verify(folder, verify)
        lists = manifest.nprobe if nprobe is None else nprobe
        regions = {r: faiss_vectors.read(storage.join(folder, vector_file(r)), lists) for r in REGIONS}
        references = ReferenceStore(storage.join(folder, REFERENCES_FILE))
        for name, count in [*((r, i.ntotal) for r, i in regions.items()), ("references", len(references))]:
            if count != manifest.count:
                raise IndexLoadError(f"{name} holds {count} rows, the manifest says {manifest.count}", where=folder)
        for region, index in regions.items():
            if index.d != manifest.dimension:
                raise IndexLoadError(f"{region}: vectors of length {index.d}, not {manifest.dimension}", where=folder)
        return cls(folder, manifest, regions, references)

    def __len__(self) -> int:
        return self.manifest.count

    def search(self, vectors: Mapping[str, npt.ArrayLike], top_k: int) -> list[list[Hit]]:
        """Candidates of each query: the union of the `top_k` nearest by each given region, most similar first.

        Equal similarities are ordered by row. A region that is left out is not searched.

        Args:
            vectors: region to unit vectors (N, D), row i of each belonging to one query.
            top_k: per region; more than the index holds gives all of it.

        Raises:
            ValueError: no or unknown regions, other shapes, vectors that are not finite and of unit length, top_k < 1.
        """
        if not vectors or not set(vectors) <= set(REGIONS) or top_k < 1:
            raise ValueError(f"cannot search regions {sorted(vectors)} with top_k {top_k}")
        queries = {r: faiss_vectors.check_vectors(vectors[r], r) for r in REGIONS if r in vectors}
        shapes = {q.shape for q in queries.values()}
        if len(shapes) != 1 or next(iter(shapes))[1] != self.manifest.dimension:
            raise ValueError(f"queries of shapes {sorted(shapes)} for vectors of length {self.manifest.dimension}")
        found = {r: faiss_vectors.search(self._regions[r], q, top_k) for r, q in queries.items()}
        count = next(iter(shapes))[0]
        return [self._merge({region: answers[query] for region, answers in found.items()}) for query in range(count)]

    def _merge(self, answers: Mapping[str, tuple[faiss_vectors.Rows, faiss_vectors.Vectors]]) -> list[Hit]:
        by_row: dict[int, dict[str, float]] = {}
        for region, (rows, similarities) in answers.items():
            for row, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
                by_row.setdefault(row, {})[region] = similarity
        hits = [
            Hit(row, self.references.id_of(row), "+".join(regions), max(regions.values()), regions)
            for row, regions in by_row.items()
        ]
        order, _ = faiss_vectors.ordered(
            np.array([hit.row for hit in hits], np.int64), np.array([hit.similarity for hit in hits], np.float32)
        )
        return [{hit.row: hit for hit in hits}[row] for row in order.tolist()]

    def fetch(self, row: int) -> Reference:
        """A reference with image and mask. Raises RowReject (`reference_missing`); see `ReferenceStore.fetch`."""
        return self.references.fetch(row)
