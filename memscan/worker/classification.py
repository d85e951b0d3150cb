"""This module makes records of generations as rows of the census table.

They hold what the copy detector finds, with evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memscan.config import CensusConfig
from memscan.detection.specifications import COPY, SEMANTIC
from memscan.errors import Reason, RowReject
from memscan.index.search import Hit
from memscan.index.store import ReferenceIndex
from memscan.io.images import encode_mask, encode_png
from memscan.localization.maps import foreground_share
from memscan.metric.fbmem import FbMem, RegionScores
from memscan.models.embedder import load_embedder
from memscan.records import Label
from memscan.worker.detector import CopyDetector, EncodedImage
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generated import Generated, mask_of, vectors_of
from memscan.worker.isolation import Isolation
from memscan.worker.semantic import SemanticSimilarity


class CopyClassifier:
    """This is the copy detector for generations.

    It makes census records that say which training image each generation copies, and where.
    """

    def __init__(
        self, config: CensusConfig, index: ReferenceIndex, encoder: RegionEncoder, device: str = "cpu"
    ) -> None:
        self.detector = CopyDetector(config, index, device, encoder)
        semantic = config.signals.semantic
        self._meaning = None if semantic is None else SemanticSimilarity(load_embedder(semantic, device), index)
        self._isolation = Isolation()
        self._judging = Isolation()  # of its own: a search that succeeds says nothing of the images that it finds

    @property
    def metric(self) -> FbMem[Any]:
        """Return the metric that compares a generation with a candidate."""
        return self.detector.metric

    @property
    def index(self) -> ReferenceIndex:
        """Return the references that candidates come from."""
        return self.detector.index

    def __call__(self, rows: Sequence[list[Generated] | RowReject]) -> list[list[dict[str, Any]] | RowReject]:
        """Return `records.GENERATION` records, one list per prompt."""
        found = self._isolation.batch(rows, self._search, Reason.SEARCH_FAILED)
        return self._judging.each(found, self._classify, Reason.CLASSIFICATION_FAILED)

    def _search(self, rows: list[list[Generated]]) -> list[list[tuple[Generated, list[Hit]]] | RowReject]:
        hits = iter(self.detector.search(np.stack([vectors_of(item) for row in rows for item in row])))
        return [[(item, next(hits)) for item in row] for row in rows]

    def _classify(self, row: list[tuple[Generated, list[Hit]]]) -> list[dict[str, Any]]:
        return [self.record(generated, hits) for generated, hits in row]

    def record(self, generated: Generated, hits: Sequence[Hit]) -> dict[str, Any]:
        """Classify one generation against its candidates.

        Raises:
            RowReject: REFERENCE_MISSING, a candidate's image is not in the index.
        """
        image = EncodedImage(generated.image_HWC, mask_of(generated), vectors_of(generated))
        found = self.detector.compare(image, hits)
        best, label = found.best, found.label
        signals = {**generated.signals, COPY.name: found.similarity}
        if self._meaning is not None:
            signals[SEMANTIC.name] = self._meaning.similarity(generated.image_HWC, best.row)
        map_HW = None if label is Label.NM else generated.map_HW
        return {
            "sample": generated.sample,
            "seed": generated.seed,
            "label": label.value,
            **_scores(best.scores),
            "missing": list(best.scores.missing),
            "terms": list(best.scores.terms.items()) or None,
            "match_id": best.reference_id,
            "foreground_area": found.foreground_area,
            "similarity": found.similarity,
            "noise_norm": generated.signals.get("noise_norm"),
            "noise_norm_first": generated.signals.get("noise_norm_first"),
            "signals": list(signals.items()),
            "candidates": [
                {
                    "reference_id": match.reference_id,
                    "found_by": match.found_by,
                    "similarity": match.similarity,
                    **_scores(match.scores),
                    "label": match.label.value,
                }
                for match in found.matches
            ],
            "evidence": None if label is Label.NM else _evidence(generated),
            "localization": None if map_HW is None else encode_mask(map_HW),
            "localized_foreground": None if map_HW is None else _share(map_HW, mask_of(generated)),
        }


def _scores(scores: RegionScores) -> dict[str, Any]:
    return {
        "foreground": scores.foreground,
        "background": scores.background,
        "whole": scores.whole,
        "copied": list(scores.copied),
    }


def _evidence(generated: Generated) -> dict[str, bytes]:
    return {"generation": encode_png(generated.image_HWC), "generation_mask": encode_mask(mask_of(generated))}


def _share(map_HW: npt.NDArray[np.float32], mask_HW: npt.NDArray[np.float32]) -> float | None:
    return foreground_share(torch.from_numpy(map_HW), torch.from_numpy(mask_HW))
