"""This module measures how similar a generation and its match are in meaning.

It is the cosine of the vectors of an image encoder, usually CLIP.

This is a different measurement from the copy similarity by which the match was found: CLIP calls two pictures of one
subject similar even if they share no pixel. The vectors of references are kept, because many generations match the same
one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from memscan.index.store import ReferenceIndex
from memscan.models.embedder import Embedder

KEPT = 16_384  # vectors of references: 50 MiB for 768 numbers each


class SemanticSimilarity:
    """This computes similarities of generations to reference images by their rows in the index."""

    def __init__(self, embedder: Embedder, index: ReferenceIndex) -> None:
        self._embedder, self._index = embedder, index
        self._reference = lru_cache(maxsize=KEPT)(self._embed_reference)

    def similarity(self, image_HWC: npt.NDArray[np.uint8], row: int) -> float:
        """Return the cosine in [-1, 1]. Raises RowReject as `Embedder.embed` and `ReferenceIndex.fetch` do."""
        return float(self._embedder.embed([image_HWC])[0] @ self._reference(row))

    def _embed_reference(self, row: int) -> npt.NDArray[np.float32]:
        vectors_ND: npt.NDArray[np.float32] = self._embedder.embed([self._index.fetch(row).image_HWC])
        return np.asarray(vectors_ND[0])
