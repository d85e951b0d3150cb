"""This module cuts an image into foreground and background by a soft mask, as FB-Mem fills them.

Source: Di et al. 2025, Algorithm 1.

The foreground is laid on black, the background on white, and each image is cut by its own mask. Outside its region a
composed image is constant, which is what inflates the published scores (docs/metric.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.errors import Reason, RowReject

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.floating[Any]]


def check_image(image_HWC: Image) -> None:
    """Raise ValueError unless the image is uint8 RGB and not empty."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.size == 0:
        raise ValueError(f"expected a uint8 RGB image, got {image_HWC.dtype} of shape {image_HWC.shape}")


def check_mask(image_HWC: Image, mask_HW: Mask) -> npt.NDArray[np.float32]:
    """Return the mask as float32, checked against its image.

    Raises:
        ValueError: the image is not uint8 RGB, the mask is not of its height and width, or has values outside [0, 1].
        RowReject: the mask is not finite (`segmentation_failed`): a fault of the row, not of the caller.
    """
    check_image(image_HWC)
    if mask_HW.shape != image_HWC.shape[:2]:
        raise ValueError(f"mask of shape {mask_HW.shape} for an image of shape {image_HWC.shape}")
    mask = np.asarray(mask_HW, dtype=np.float32)
    if not np.isfinite(mask).all():
        raise RowReject(Reason.SEGMENTATION_FAILED, "the foreground mask holds values that are not finite")
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"mask values must lie in [0, 1], got [{mask.min():g}, {mask.max():g}]")
    return mask


def compose_foreground(image_HWC: Image, mask_HW: Mask) -> Image:
    """Return m x on black: uint8 HWC, rounded to nearest. Raises as `check_mask` does."""
    mask_HW1 = check_mask(image_HWC, mask_HW)[..., None]
    return np.asarray(np.rint(mask_HW1 * image_HWC), dtype=np.uint8)


def compose_background(image_HWC: Image, mask_HW: Mask) -> Image:
    """Return (1 - m) x on white: uint8 HWC, rounded to nearest. Raises as `check_mask` does."""
    mask_HW1 = check_mask(image_HWC, mask_HW)[..., None]
    # As x + m (255 - x), so that a mask of 1 gives exactly white and one of 0 exactly the image.
    return np.asarray(np.rint(image_HWC + mask_HW1 * (255 - image_HWC)), dtype=np.uint8)
