"""This module maps where the generations of one prompt agree, from the images of a census, without a call of the model.

Memorised content looks the same for every seed, and other content is different each time. The spread over seeds is
therefore small where something is memorised. This is our own method and has not been published (docs/detection.md). It
needs several generations, and gives one map for all of them. It does not work for a prompt that reaches several
training images, because its generations differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

AGREE = 20.0  # levels of 255; chosen on planted world 2 among 10, 15, 20, 25, 30 and 40


def seed_agreement(
    images_SHWC: NDArray[np.uint8], shape: tuple[int, int], *, tolerance: float = AGREE
) -> NDArray[np.float32]:
    """Return the share of each cell's pixels on which the generations agree, (h, w) in [0, 1].

    A pixel agrees where the standard deviation over generations (divided by S), mean over colours, is below
    `tolerance` levels.

    Args:
        images_SHWC: generations of one prompt.
        shape: of the grid, rows and columns.

    Raises:
        ValueError: fewer than two generations.
    """
    if len(images_SHWC) < 2:
        raise ValueError("agreement needs two generations")
    spread_HW = images_SHWC.astype(np.float32).std(axis=0).mean(axis=-1)
    agrees = Image.fromarray((spread_HW < tolerance).astype(np.float32))
    return np.asarray(agrees.resize((shape[1], shape[0]), Image.Resampling.BOX))
