"""This module applies segmenter and embedder to generations and reference images alike, without Ray and tables.

It is separate from `generation.py`, because the workers that build an index need no generator, whose import takes
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.config import CensusConfig
from memscan.errors import Reason, RowReject
from memscan.io.images import decode, encode_mask
from memscan.metric.regions import compose_background, compose_foreground
from memscan.models.embedder import Embedder, load_embedder
from memscan.models.probe import probe_embedder, probe_segmenter
from memscan.models.segmenter import Segmenter, load_segmenter
from memscan.records import REGIONS
from memscan.worker.isolation import Isolation


class RegionEncoder:
    """This is a loaded segmenter and embedder.

    Args:
        segmenter: a loaded one; by default it is loaded as configured.
    """

    def __init__(self, config: CensusConfig, device: str, threads: int, segmenter: Segmenter | None = None) -> None:
        self.segmenter = segmenter or load_segmenter(config.segmenter, device, threads=threads)
        if segmenter is None:
            probe_segmenter(self.segmenter, config.segmenter.path)
        self.embedder: Embedder = load_embedder(config.embedder, device)
        probe_embedder(self.embedder, config.embedder.path)
        self._isolation = Isolation()

    def masks(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.float32]]:
        """Return foreground masks (H, W) in [0, 1]."""
        return self.segmenter.segment(images)

    def vectors(
        self, images: Sequence[npt.NDArray[np.uint8]], masks: Sequence[npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """Return unit vectors (N, 3, D) of whole image, foreground and background."""
        views = list(images)
        views += [compose_foreground(image, mask) for image, mask in zip(images, masks, strict=True)]
        views += [compose_background(image, mask) for image, mask in zip(images, masks, strict=True)]
        return self.embedder.embed(views).reshape(len(REGIONS), len(images), -1).transpose(1, 0, 2)

    def __call__(self, encoded: Sequence[bytes | RowReject]) -> list[tuple[bytes, npt.NDArray[np.float32]] | RowReject]:
        """Return mask (PNG) and vectors (3, D) of encoded reference images."""
        images = self._isolation.each(encoded, decode, Reason.IMAGE_UNDECODABLE)
        masked = self._isolation.batch(images, self._with_masks, Reason.SEGMENTATION_FAILED)
        return self._isolation.batch(masked, self._with_vectors, Reason.EMBEDDING_FAILED)

    def _with_masks(self, images: list[Any]) -> list[Any]:
        return list(zip(images, self.masks(images), strict=True))

    def _with_vectors(self, pairs: list[Any]) -> list[Any]:
        vectors_NRD = self.vectors([image for image, _ in pairs], [mask for _, mask in pairs])
        return [(encode_mask(mask), vectors_RD) for (_, mask), vectors_RD in zip(pairs, vectors_NRD, strict=True)]
