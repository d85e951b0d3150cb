"""This module compares one image with another: by the segmenter's masks and the metric, without index and embedder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memscan.config import CensusConfig
from memscan.errors import InputError, RowReject
from memscan.metric.calibration import Calibration
from memscan.metric.comparison import Comparison, Picture, compare_pictures
from memscan.metric.variants import load_metric
from memscan.models.segmenter import load_segmenter
from memscan.worker.detector import ImageLike, read_pixels


def compare_images(
    generated: ImageLike,
    reference: ImageLike,
    config: CensusConfig,
    calibration: Calibration | None = None,
    device: str = "cpu",
) -> Comparison:
    """Compare an image with the one that it may copy.

    Args:
        generated, reference: in any form of `ImageLike`, of any sizes.
        config: its `segmenter` and `metric` are used.
        calibration: where the metric's thresholds come from; with it the comparison has probabilities.
        device: where segmenter and metric run.

    Raises:
        InputError: one of the two is not an image.
        ModelError: the segmenter cannot be loaded.
        RowReject: an image cannot be segmented.
    """
    pixels = [_pixels(image) for image in (generated, reference)]
    masks = load_segmenter(config.segmenter, device).segment(pixels)
    names = [_name(image, role) for image, role in ((generated, "generated"), (reference, "reference"))]
    own, other = (Picture(*one) for one in zip(names, pixels, masks, strict=True))
    return compare_pictures(load_metric(config.metric, device), own, other, calibration)


def _pixels(image: ImageLike) -> np.ndarray:
    try:
        return read_pixels(image)
    except RowReject as reject:
        raise InputError(f"is not an image: {reject.message}", where=_name(image, "image")) from reject


def _name(image: ImageLike, role: str) -> str:
    return str(image) if isinstance(image, (str, Path)) else role
