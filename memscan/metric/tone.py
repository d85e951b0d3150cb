"""This module compares the coarse brightness of two backgrounds: the term `tone_background` of the variant `combined`.

Both images are reduced to 32 x 32 cells of grey. The tone is the correlation of these cells where the reference's mask
is background. Edges, which `robust` compares, say little of a plain or blurred surrounding; light and dark areas do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from memscan.metric.regions import Image

CELLS = 32
_FLOOR = 1e-3  # of the deviations' product: two even surroundings correlate with nothing


@dataclass(frozen=True)
class Tone:
    """This is an image reduced to cells.

    Attributes:
        grey_HW: mean of red, green and blue, in [0, 1].
        outside_HW: share of background by the image's own mask, in [0, 1]; None if it has no mask.
    """

    grey_HW: Tensor
    outside_HW: Tensor | None


def prepare_tone(image_HWC: Image, mask_HW: npt.NDArray[np.floating] | None, device: torch.device) -> Tone:
    """Reduce an image, uint8 RGB, and its mask in [0, 1], if it has one."""
    pixels = torch.from_numpy(np.array(image_HWC)).to(device).permute(2, 0, 1)[None].float().div(255)
    grey_HW = _reduced(pixels)[0].mean(0)
    if mask_HW is None:
        return Tone(grey_HW, None)
    mask = torch.from_numpy(np.array(mask_HW, np.float32)).to(device)[None, None]
    return Tone(grey_HW, 1 - _reduced(mask)[0, 0].clamp(0, 1))


def tone(generated: Tone, reference: Tone) -> float:
    """Return the correlation of both images' grey in the reference's background, in [-1, 1].

    Raises:
        ValueError: the reference has no mask.
    """
    if reference.outside_HW is None:
        raise ValueError("the reference needs its mask")
    weight_HW = reference.outside_HW / reference.outside_HW.sum().clamp(min=1e-6)
    own_HW, other_HW = (grey - (grey * weight_HW).sum() for grey in (generated.grey_HW, reference.grey_HW))
    deviations = ((own_HW**2 * weight_HW).sum() * (other_HW**2 * weight_HW).sum()).sqrt()
    return float((own_HW * other_HW * weight_HW).sum() / (deviations + _FLOOR))


def _reduced(image_1CHW: Tensor) -> Tensor:
    return functional.interpolate(image_1CHW, (CELLS, CELLS), mode="bilinear", antialias=True)
