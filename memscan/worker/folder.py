"""This module compares every image of a folder with a reference index, as the census does with generations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memscan.config import CensusConfig
from memscan.errors import InputError, RowReject
from memscan.sources.layouts import IMAGE_SUFFIXES
from memscan.worker.detector import CopyDetector, Detection

_BATCH = 16


def compare_folder(folder: str, index: str, config: CensusConfig) -> Iterator[dict[str, Any]]:
    """Yield one row per image, in the order of names: `status` "done" with label, scores and reference, or "rejected".

    Raises:
        InputError: the folder holds no image files.
        IndexLoadError: the index is missing, damaged, or of another embedder.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError("holds no image files", where=folder)
    detector = CopyDetector(config, index)
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        yield from (_row(path, found, detector) for path, found in zip(batch, detector(batch), strict=True))


def _row(path: Path, found: Detection | RowReject, detector: CopyDetector) -> dict[str, Any]:
    if isinstance(found, RowReject):
        return {
            "generated": str(path),
            "status": "rejected",
            "reason": found.reason.value,
            "message": found.message,
        }
    scores, metric = found.best.scores, detector.metric.config
    return {
        "generated": str(path),
        "status": "done",
        "label": found.label.value,
        "reference": found.best.reference_id,
        "scores": {"foreground": scores.foreground, "background": scores.background, "whole": scores.whole},
        "areas": {"generated_foreground": found.foreground_area},
        "threshold": {"foreground": metric.foreground_threshold, "background": metric.background_threshold},
        "copied": list(scores.copied),
        "terms": dict(scores.terms),
        "margin": found.margin,
        "similarity": found.similarity,
        "variant": metric.variant,
        "canvas": metric.canvas,
    }
