"""This module is the copy detector.

From images and a reference index, it finds which references the images copy, in which region, and how certain this is.

    image ──▶ mask ──▶ vectors of three regions ──▶ candidates ──▶ FB-Mem on each ──▶ the one that decides

The census classifies its generations with it (`classification`), `memscan compare` a folder (`folder`), and a notebook
calls it as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from memscan.config import CensusConfig
from memscan.errors import ConfigError, Reason, RowReject
from memscan.index.search import Hit, nearest_whole
from memscan.index.store import ReferenceIndex
from memscan.io.images import decode
from memscan.metric.decision import SEVERITY
from memscan.metric.fbmem import FbMem, Prepared, RegionScores
from memscan.metric.variants import load_metric
from memscan.records import REGIONS, Label
from memscan.worker.encoder import RegionEncoder
from memscan.worker.isolation import Isolation

KEPT_VECTORS = 4096  # of references, 6 KiB each with SSCD

# An image as a caller has it: pixels (H, W, 3), RGB, uint8; the bytes of an image file; or the file's path.
ImageLike: TypeAlias = npt.NDArray[np.uint8] | bytes | str | Path


@dataclass(frozen=True)
class Match:
    """This is a reference with which an image was compared.

    Attributes:
        row: of the reference in the index.
        found_by: the regions whose search found it, joined by "+".
        similarity: the cosine of the embeddings, in [-1, 1], the best of those regions.
        scores: how much of each region is copied, each in [0, 1].
        label: the label that these scores give for this reference alone.
    """

    row: int
    reference_id: str
    found_by: str
    similarity: float
    scores: RegionScores
    label: Label


@dataclass(frozen=True)
class Detection:
    """This is what was found for one image.

    Attributes:
        label: of the reference that decides, which is the first of `matches`.
        matches: every reference that was compared, the one that decides first, then by label and scores.
        margin: distance of the deciding score from its threshold: at least 0 for a copy, below 0 for NM.
        similarity: the cosine of the whole image to its nearest reference; -1 if none was found by the whole image.
        foreground_area: the share of the image that is foreground, in [0, 1].
    """

    label: Label
    matches: tuple[Match, ...]
    margin: float
    similarity: float
    foreground_area: float

    @property
    def best(self) -> Match:
        """Return the reference that decides."""
        return self.matches[0]

    def generation(self, sample: int = 0) -> dict[str, Any]:
        """Return what `memscan.verdict` needs to know about one generation, as in `records.GENERATION`."""
        scores = self.best.scores
        return {
            "sample": sample,
            "label": self.label.value,
            "foreground": scores.foreground,
            "background": scores.background,
            "whole": scores.whole,
            "missing": list(scores.missing),
            "match_id": self.best.reference_id,
            "foreground_area": self.foreground_area,
            "similarity": self.similarity,
        }


@dataclass(frozen=True)
class EncodedImage:
    """This image is ready for a search: pixels (H, W, 3), mask (H, W) in [0, 1], and unit vectors (3, D) by region."""

    image_HWC: npt.NDArray[np.uint8]
    mask_HW: npt.NDArray[np.float32]
    vectors_RD: npt.NDArray[np.float32]


class CopyDetector:
    """This finds which reference images an image copies, and in which regions.

    It must not be used by several threads at once.

    Args:
        config: its `segmenter`, `embedder`, `metric` and `index` are used.
        index: an open index, or the folder of one; by default the configuration's `index.path`.
        device: where the models run.
        encoder: loaded segmenter and embedder; by default they are loaded as configured.

    Raises:
        ConfigError: neither `index` nor `index.path` is given.
        ModelError: segmenter or embedder cannot be loaded.
        IndexLoadError: there is no index, it is damaged, or it was made by another embedder.
    """

    def __init__(
        self,
        config: CensusConfig,
        index: ReferenceIndex | str | Path | None = None,
        device: str = "cpu",
        encoder: RegionEncoder | None = None,
    ) -> None:
        self.top_k = config.index.top_k
        self.encoder = encoder or RegionEncoder(config, device, threads=1)
        self.index = index if isinstance(index, ReferenceIndex) else self._open(config, index)
        self.metric: FbMem[Any] = load_metric(config.metric, device)
        self._kept: OrderedDict[int, Prepared] = OrderedDict()
        self._kept_bytes = 0
        # One takes 4 MiB at a canvas of 176 and 35 MiB at the published 512.
        self._most_bytes = config.resources.reference_cache_mib * 2**20
        # Cosines by region are terms of the metric only where they are of the embedder that its weights were fitted on.
        self._embedded = self.metric.embedder is not None and self.metric.embedder == config.embedder.name
        self._vectors: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()
        self._isolation = Isolation()

    def _open(self, config: CensusConfig, index: str | Path | None) -> ReferenceIndex:
        folder = config.index.path if index is None else str(index)
        if folder is None:
            raise ConfigError("no index", where="index.path", hint="give the folder of an index")
        spec = self.encoder.embedder.spec
        return ReferenceIndex.open(folder, spec, nprobe=config.index.nprobe, verify="once")

    def __call__(self, images: Sequence[ImageLike | RowReject]) -> list[Detection | RowReject]:
        """Detect copies in images.

        Args:
            images: in any form of `ImageLike`, of any sizes; earlier rejects keep their places.

        Returns:
            One result per image, in order: a detection, or the reject that says why there is none.
        """
        encoded = self.encode(images)
        found = self._isolation.batch(encoded, self._search, Reason.SEARCH_FAILED)
        return self._isolation.each(found, lambda pair: self.compare(*pair), Reason.CLASSIFICATION_FAILED)

    def encode(self, images: Sequence[ImageLike | RowReject]) -> list[EncodedImage | RowReject]:
        """Return masks and vectors of images, by the same steps as those of the references."""
        items: Sequence[Any] = images
        pixels = self._isolation.each(items, read_pixels, Reason.IMAGE_UNDECODABLE)
        masked = self._isolation.batch(pixels, self._with_masks, Reason.SEGMENTATION_FAILED)
        return self._isolation.batch(masked, self._with_vectors, Reason.EMBEDDING_FAILED)

    def _with_masks(self, images: list[Any]) -> list[Any]:
        return list(zip(images, self.encoder.masks(images), strict=True))

    def _with_vectors(self, pairs: list[Any]) -> list[EncodedImage | RowReject]:
        vectors_NRD = self.encoder.vectors([image for image, _ in pairs], [mask for _, mask in pairs])
        return [EncodedImage(image, mask, vectors) for (image, mask), vectors in zip(pairs, vectors_NRD, strict=True)]

    def _search(self, images: list[EncodedImage]) -> list[tuple[EncodedImage, list[Hit]] | RowReject]:
        return list(zip(images, self.search(np.stack([image.vectors_RD for image in images])), strict=True))

    def search(self, vectors_NRD: npt.NDArray[np.float32]) -> list[list[Hit]]:
        """Return the candidates of each image: the nearest references by each region, `index.top_k` of each."""
        queries = {region: np.ascontiguousarray(vectors_NRD[:, at]) for at, region in enumerate(REGIONS)}
        return self.index.search(queries, self.top_k)

    def compare(self, image: EncodedImage, hits: Sequence[Hit]) -> Detection:
        """Compare an image with its candidates.

        Raises:
            RowReject: REFERENCE_MISSING, a candidate's image is not in the index.
            ValueError: no candidates.
        """
        references = [self._reference(hit.row) for hit in hits]
        prepared = self.metric.prepare(image.image_HWC, image.mask_HW)
        scores = self.metric.score_found(prepared, references, [self._similarities(image, hit) for hit in hits])
        best, label = self.metric.match(scores)
        matches = [
            Match(hit.row, hit.reference_id, hit.found_by, hit.similarity, score, self.metric.classify(score))
            for hit, score in zip(hits, scores, strict=True)
        ]
        order = sorted(
            range(len(hits)), key=lambda at: (at != best, -SEVERITY[matches[at].label], -_sum(matches[at].scores))
        )
        return Detection(
            label=label,
            matches=tuple(matches[at] for at in order),
            margin=self.metric.margin(scores[best]),
            similarity=nearest_whole(hits),
            foreground_area=float(image.mask_HW.mean()),
        )

    def _similarities(self, image: EncodedImage, hit: Hit) -> dict[str, float]:
        """Cosines of all regions with a candidate: those of the search, otherwise from the reference's own vectors."""
        if not self._embedded:
            return {}
        if set(REGIONS) <= set(hit.similarities):
            return dict(hit.similarities)
        cosines_R = (image.vectors_RD * self._vectors_of(hit.row)).sum(axis=1)
        return dict(zip(REGIONS, cosines_R.tolist(), strict=True))

    def _vectors_of(self, row: int) -> npt.NDArray[np.float32]:
        """A reference's unit vectors (3, D), kept: an index answers by nearness and does not give vectors out."""
        if row in self._vectors:
            self._vectors.move_to_end(row)
            return self._vectors[row]
        reference = self.index.fetch(row)
        mask_HW = reference.mask_HW
        if mask_HW is None:
            mask_HW = self.encoder.masks([reference.image_HWC])[0]
        self._vectors[row] = self.encoder.vectors([reference.image_HWC], [mask_HW])[0]
        if len(self._vectors) > KEPT_VECTORS:
            self._vectors.popitem(last=False)
        return self._vectors[row]

    def _reference(self, row: int) -> Prepared:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        reference = self.index.fetch(row)
        mask_HW = reference.mask_HW
        if mask_HW is None:  # of an index made of ready embeddings
            mask_HW = self.encoder.masks([reference.image_HWC])[0]
        prepared: Prepared = self.metric.prepare(reference.image_HWC, mask_HW)
        while self._kept and self._kept_bytes + prepared.nbytes > self._most_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[row] = prepared
        self._kept_bytes += prepared.nbytes
        return prepared

    def forget(self) -> None:
        """Drop the prepared references that are kept in memory."""
        self._kept.clear()
        self._vectors.clear()
        self._kept_bytes = 0


def read_pixels(image: ImageLike) -> npt.NDArray[np.uint8]:
    """Return pixels (H, W, 3), RGB, uint8.

    Raises:
        RowReject: IMAGE_MISSING, the file cannot be read; IMAGE_UNDECODABLE, it is no image, or the array is not uint8
            (H, W, 3).
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            found = f"{image.dtype} of shape {image.shape}"
            raise RowReject(Reason.IMAGE_UNDECODABLE, f"pixels are uint8 of shape (height, width, 3), not {found}")
        return image
    if isinstance(image, bytes):
        return decode(image)
    try:
        return decode(Path(image).read_bytes())
    except OSError as error:
        raise RowReject(Reason.IMAGE_MISSING, str(error)) from error


def _sum(scores: RegionScores) -> float:
    return scores.foreground + scores.background
