"""Generations to records: candidates from the reference index, FB-Mem on each, the one that decides."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memscan.config import CensusConfig
from memscan.detection.specifications import COPY, SEMANTIC
from memscan.errors import Reason, RowReject
from memscan.index.search import Hit, nearest_whole
from memscan.index.store import ReferenceIndex
from memscan.io.images import encode_mask, encode_png
from memscan.localization.maps import foreground_share
from memscan.metric.decision import SEVERITY
from memscan.metric.fbmem import Prepared, RegionScores
from memscan.metric.variants import load_metric
from memscan.models.embedder import load_embedder
from memscan.records import REGIONS, Label
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generated import Generated, mask_of, vectors_of
from memscan.worker.isolation import Isolation
from memscan.worker.semantic import SemanticSimilarity

KEPT_VECTORS = 4096  # of references, 6 KiB each with SSCD


class CopyClassifier:
    """The reference index and FB-Mem: which training image a generation copies, and where."""

    def __init__(
        self, config: CensusConfig, index: ReferenceIndex, encoder: RegionEncoder, device: str = "cpu"
    ) -> None:
        self.index, self.top_k, self._encoder = index, config.index.top_k, encoder
        semantic = config.signals.semantic
        self._meaning = None if semantic is None else SemanticSimilarity(load_embedder(semantic, device), index)
        self.metric = load_metric(config.metric, device)
        self._kept: OrderedDict[int, Prepared] = OrderedDict()
        self._kept_bytes = 0
        # Cosines by region are terms of the metric only where they are of the embedder that its weights were fitted on.
        self._embedded = self.metric.embedder is not None and self.metric.embedder == config.embedder.name
        self._vectors: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()
        # One takes 4 MiB at a canvas of 176 and 35 MiB at the published 512.
        self._most_bytes = config.resources.reference_cache_mib * 2**20
        self._isolation = Isolation()

    def __call__(self, rows: Sequence[list[Generated] | RowReject]) -> list[list[dict[str, Any]] | RowReject]:
        """`records.GENERATION` records, one list a prompt."""
        found = self._isolation.batch(rows, self._search, Reason.SEARCH_FAILED)
        return self._isolation.each(found, self._classify, Reason.CLASSIFICATION_FAILED)

    def _search(self, rows: list[list[Generated]]) -> list[list[tuple[Generated, list[Hit]]] | RowReject]:
        stacked_NRD = np.stack([vectors_of(item) for row in rows for item in row])
        queries = {region: np.ascontiguousarray(stacked_NRD[:, at]) for at, region in enumerate(REGIONS)}
        hits = iter(self.index.search(queries, self.top_k))
        return [[(item, next(hits)) for item in row] for row in rows]

    def _classify(self, row: list[tuple[Generated, list[Hit]]]) -> list[dict[str, Any]]:
        return [self.record(generated, hits) for generated, hits in row]

    def record(self, generated: Generated, hits: Sequence[Hit]) -> dict[str, Any]:
        """Classify one generation against its candidates.

        Raises:
            RowReject: REFERENCE_MISSING, a candidate's image is not in the index.
        """
        references = [self._reference(hit.row) for hit in hits]
        prepared = self.metric.prepare(generated.image_HWC, mask_of(generated))
        scores = self.metric.score_found(prepared, references, [self._similarities(generated, hit) for hit in hits])
        best, label = self.metric.match(scores)
        labels = [self.metric.classify(score) for score in scores]
        signals = {**generated.signals, COPY.name: nearest_whole(hits)}
        if self._meaning is not None:
            signals[SEMANTIC.name] = self._meaning.similarity(generated.image_HWC, hits[best].row)
        map_HW = None if label is Label.NM else generated.map_HW
        order = sorted(range(len(hits)), key=lambda at: (at != best, -SEVERITY[labels[at]], -_sum(scores[at])))
        return {
            "sample": generated.sample,
            "seed": generated.seed,
            "label": label.value,
            **_scores(scores[best]),
            "missing": list(scores[best].missing),
            "terms": list(scores[best].terms.items()) or None,
            "match_id": hits[best].reference_id,
            "foreground_area": float(mask_of(generated).mean()),
            "similarity": nearest_whole(hits),
            "noise_norm": generated.signals.get("noise_norm"),
            "noise_norm_first": generated.signals.get("noise_norm_first"),
            "signals": list(signals.items()),
            "candidates": [
                {
                    "reference_id": hits[at].reference_id,
                    "found_by": hits[at].found_by,
                    "similarity": hits[at].similarity,
                    **_scores(scores[at]),
                    "label": labels[at].value,
                }
                for at in order
            ],
            "evidence": None if label is Label.NM else _evidence(generated),
            "localization": None if map_HW is None else encode_mask(map_HW),
            "localized_foreground": None if map_HW is None else _share(map_HW, mask_of(generated)),
        }

    def _similarities(self, generated: Generated, hit: Hit) -> dict[str, float]:
        """Cosines of all regions with a candidate: those of the search, else from the reference's own vectors."""
        if not self._embedded:
            return {}
        if set(REGIONS) <= set(hit.similarities):
            return dict(hit.similarities)
        cosines_R = (vectors_of(generated) * self._vectors_of(hit.row)).sum(axis=1)
        return dict(zip(REGIONS, cosines_R.tolist(), strict=True))

    def _vectors_of(self, row: int) -> npt.NDArray[np.float32]:
        """A reference's unit vectors (3, D), kept: an index answers by nearness and does not give vectors out."""
        if row in self._vectors:
            self._vectors.move_to_end(row)
            return self._vectors[row]
        reference = self.index.fetch(row)
        mask_HW = reference.mask_HW
        if mask_HW is None:
            mask_HW = self._encoder.masks([reference.image_HWC])[0]
        self._vectors[row] = self._encoder.vectors([reference.image_HWC], [mask_HW])[0]
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
            mask_HW = self._encoder.masks([reference.image_HWC])[0]
        prepared: Prepared = self.metric.prepare(reference.image_HWC, mask_HW)
        while self._kept and self._kept_bytes + prepared.nbytes > self._most_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[row] = prepared
        self._kept_bytes += prepared.nbytes
        return prepared


def _scores(scores: RegionScores) -> dict[str, Any]:
    return {
        "foreground": scores.foreground,
        "background": scores.background,
        "whole": scores.whole,
        "copied": list(scores.copied),
    }


def _sum(scores: RegionScores) -> float:
    return scores.foreground + scores.background


def _evidence(generated: Generated) -> dict[str, bytes]:
    return {"generation": encode_png(generated.image_HWC), "generation_mask": encode_mask(mask_of(generated))}


def _share(map_HW: npt.NDArray[np.float32], mask_HW: npt.NDArray[np.float32]) -> float | None:
    return foreground_share(torch.from_numpy(map_HW), torch.from_numpy(mask_HW))
