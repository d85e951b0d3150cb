"""Every image of a folder against a reference index, as the census judges a generation; without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.config import CensusConfig
from memscan.errors import InputError, Reason, RowReject
from memscan.index.store import ReferenceIndex
from memscan.io.images import decode
from memscan.metric.fbmem import RegionScores
from memscan.sources.layouts import IMAGE_SUFFIXES
from memscan.worker.classification import CopyClassifier
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generated import Generated
from memscan.worker.isolation import Isolation

_BATCH = 16


def compare_folder(folder: str, index: str, config: CensusConfig) -> Iterator[dict[str, Any]]:
    """One row an image, in the order of their names: `status` "done" with label, scores and reference, or "rejected".

    Raises:
        InputError: the folder holds no image files.
        IndexLoadError: the index is missing, damaged, or of another embedder.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError("holds no image files", where=folder)
    encoder = RegionEncoder(config, "cpu", 1)
    opened = ReferenceIndex.open(index, encoder.embedder.spec, nprobe=config.index.nprobe, verify="once")
    classifier = CopyClassifier(config, opened, encoder)
    isolation = Isolation()
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        pixels = isolation.each(batch, _read, Reason.IMAGE_UNDECODABLE)
        described = isolation.each(pixels, lambda image: _described(image, encoder), Reason.EMBEDDING_FAILED)
        yield from (_row(path, verdict, classifier) for path, verdict in zip(batch, classifier(described), strict=True))


def _read(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise RowReject(Reason.IMAGE_MISSING, str(error)) from error


def _described(image_HWC: npt.NDArray[np.uint8], encoder: RegionEncoder) -> list[Generated]:
    masks = encoder.masks([image_HWC])
    return [Generated(0, 0, image_HWC, {}, masks[0], encoder.vectors([image_HWC], masks)[0])]


def _row(path: Path, verdict: list[dict[str, Any]] | RowReject, classifier: CopyClassifier) -> dict[str, Any]:
    if isinstance(verdict, RowReject):
        return {
            "generated": str(path),
            "status": "rejected",
            "reason": verdict.reason.value,
            "message": verdict.message,
        }
    record, metric = verdict[0], classifier.metric
    names = ("foreground", "background", "whole")
    return {
        "generated": str(path),
        "status": "done",
        "label": record["label"],
        "reference": record["match_id"],
        "scores": {name: record[name] for name in names},
        "areas": {"generated_foreground": record["foreground_area"]},
        "threshold": {name: getattr(metric.config, f"{name}_threshold") for name in names[:2]},
        "copied": record["copied"],
        "margin": metric.margin(
            RegionScores(record["foreground"], record["background"], record["whole"], missing=tuple(record["missing"]))
        ),
        "similarity": record["similarity"],
        "variant": metric.config.variant,
        "canvas": metric.config.canvas,
    }
