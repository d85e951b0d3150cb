"""This module is one generation while a worker processes it: first pixels, then mask and vectors, then a record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Generated:
    """This is one generation before it is classified.

    Args:
        image_HWC: RGB, uint8.
        mask_HW: foreground in [0, 1], float32.
        vectors_RD: unit vectors in the order of `records.REGIONS`, float32.
        signals: detector scores by name.
        map_HW: localisation map in [0, 1] in steps of 1 / 255, float32; None if the model gives none.
    """

    sample: int
    seed: int
    image_HWC: npt.NDArray[np.uint8]
    signals: dict[str, float]
    mask_HW: npt.NDArray[np.float32] | None = None
    vectors_RD: npt.NDArray[np.float32] | None = None
    map_HW: npt.NDArray[np.float32] | None = None


def mask_of(generated: Generated) -> npt.NDArray[np.float32]:
    assert generated.mask_HW is not None
    return generated.mask_HW


def vectors_of(generated: Generated) -> npt.NDArray[np.float32]:
    assert generated.vectors_RD is not None
    return generated.vectors_RD
