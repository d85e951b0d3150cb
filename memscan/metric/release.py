"""This module is the variant `release` of FB-Mem.

It computes the scores of the released scripts of Di et al. 2025, for published figures.

`paper` is the formula as it is written. The scripts behind the published figures differ from it in five places, all of
which are kept here, so that a published number and one of ours are in one unit (docs/parity.md says what each costs):

* The training image's foreground is an RGBA file whose alpha is its mask; a generation's comes back opaque.
* Backgrounds are filled as (1 - m) x + m^2 255, so that a soft border is darker than white.
* MS-SSIM gets no data range and takes, at every scale again, the greater of both images' ranges, alpha included.
* A generation or a training image whose foreground is nearly black: the foreground score is that of the training
  image's *background* beside the generation's foreground. Nearly white backgrounds take the foreground score.
* No region counts as missing: whatever score a region has fires by its own threshold.

The scripts also store generations as JPEG, which is a matter of the files that are compared, not of this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PilImage
from torch import Tensor
from torch.nn import functional

from memscan.io import images
from memscan.metric.fbmem import FbMem, RegionScores
from memscan.metric.paper import NEAR_BLACK, NEAR_WHITE
from memscan.metric.regions import Image, Mask, compose_foreground
from memscan.metric.ssim import SCALES, combine_scales, contrast_map, level_of, luminance_map


@dataclass(frozen=True)
class ReleasedImages:
    """These are one image's canvases, RGBA in [0, 1], (1, 4, H, W) float32.

    Attributes:
        whole, background: opaque.
        generated_foreground: on black, opaque, as the scripts read a generation's.
        reference_foreground: on black with the mask as alpha, as they read a training image's.
        foreground_area: mean of the mask, in [0, 1].
        nearly_black, nearly_white: whether more than 97 % of the foreground or background is.
    """

    whole: Tensor
    background: Tensor
    generated_foreground: Tensor
    reference_foreground: Tensor
    foreground_area: float
    nearly_black: bool
    nearly_white: bool

    @property
    def nbytes(self) -> int:
        """This is the memory that is held, in bytes: 16 MiB on a canvas of 512."""
        tensors = (self.whole, self.background, self.generated_foreground, self.reference_foreground)
        return sum(t.element_size() * t.nelement() for t in tensors)


class ReleaseFbMem(FbMem[ReleasedImages]):
    """This is the metric of the released scripts. Labels and matching are those of `FbMem`."""

    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> ReleasedImages:
        """Cut, fill and resize an image; arguments and errors as `FbMem.prepare`."""
        mask = self._checked(image_HWC, mask_HW)
        assert mask is not None  # the configuration has no `masks: reference` for filled canvases
        side, mask_HW1 = self.config.canvas, mask[..., None]
        foreground = compose_foreground(image_HWC, mask)
        filled = np.rint((1 - mask_HW1) * image_HWC + mask_HW1**2 * 255).astype(np.uint8)
        black, white = (images.resize(picture, (side, side)) for picture in (foreground, filled))
        alpha_HW1 = np.rint(mask_HW1 * 255).astype(np.uint8)
        least = 1 - self.config.degenerate_area
        return ReleasedImages(
            whole=self._canvas(images.resize(image_HWC, (side, side))),
            background=self._canvas(white),
            generated_foreground=self._canvas(black),
            reference_foreground=self._canvas(_resized_rgba(np.concatenate([foreground, alpha_HW1], axis=2), side)),
            foreground_area=float(mask.mean(dtype=np.float64)),
            nearly_black=bool((black < NEAR_BLACK * 255).all(axis=2).mean() > least),
            nearly_white=bool((white > NEAR_WHITE * 255).all(axis=2).mean() > least),
        )

    def _canvas(self, pixels_HWC: Image) -> Tensor:
        canvas = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).to(self.device).permute(2, 0, 1)[None]
        canvas = canvas.to(torch.float32).div(255)
        opaque = torch.ones_like(canvas[:, :1])
        return canvas if canvas.shape[1] == 4 else torch.cat([canvas, opaque], dim=1)

    def score(self, generated: ReleasedImages, references: Sequence[ReleasedImages]) -> list[RegionScores]:
        """Return scores of one generated image against each reference, in their order."""
        return [self._scored(generated, reference) for reference in references]

    def _scored(self, generated: ReleasedImages, reference: ReleasedImages) -> RegionScores:
        copied = []
        if generated.nearly_black or reference.nearly_black:
            foreground = released_ms_ssim(generated.generated_foreground, reference.background)
            copied.append("foreground")
        else:
            foreground = released_ms_ssim(generated.generated_foreground, reference.reference_foreground)
        if generated.nearly_white or reference.nearly_white:
            background = released_ms_ssim(generated.generated_foreground, reference.reference_foreground)
            copied.append("background")
        else:
            background = released_ms_ssim(generated.background, reference.background)
        areas = generated.foreground_area, reference.foreground_area
        return RegionScores(
            foreground,
            background,
            released_ms_ssim(generated.whole, reference.whole),
            min(areas),
            1 - max(areas),
            copied=tuple(copied),
        )

    def maps(self, generated: ReleasedImages, reference: ReleasedImages) -> dict[str, Tensor]:
        """Return contrast-structure of both filled canvases at the finest scale, range 1, as the mean over RGB."""
        pairs = {
            "filled foregrounds": (generated.generated_foreground, reference.reference_foreground),
            "filled backgrounds": (generated.background, reference.background),
        }
        return {
            title: contrast_map(level_of(own[:, :3]), level_of(other[:, :3]))[0].mean(0)
            for title, (own, other) in pairs.items()
        }


def released_ms_ssim(a_1CHW: Tensor, b_1CHW: Tensor) -> float:
    """Return MS-SSIM as torchmetrics computes it without a given data range.

    Each scale has the range of its own images.

    SSIM with a data range L is SSIM with range 1 of the images divided by L. Two constant images have none: 0.
    """
    terms = []
    for scale in range(SCALES):
        last = scale == SCALES - 1
        extent = max(float(x.max() - x.min()) for x in (a_1CHW, b_1CHW))
        if extent == 0:
            return 0.0
        own, other = (level_of(x / extent, padded=last) for x in (a_1CHW, b_1CHW))
        map_1CHW = contrast_map(own, other)
        if last:
            map_1CHW = map_1CHW * luminance_map(own, other, torch.zeros(a_1CHW.shape[1], device=a_1CHW.device))
        terms.append(map_1CHW.mean())
        a_1CHW, b_1CHW = functional.avg_pool2d(a_1CHW, 2), functional.avg_pool2d(b_1CHW, 2)
    return min(1.0, float(combine_scales(torch.stack(terms)[None])))


def _resized_rgba(pixels_HWC: Image, side: int) -> Image:
    """Return an RGBA image resized with Lanczos; as Pillow does it, with its colours multiplied by alpha meanwhile."""
    return np.asarray(PilImage.fromarray(pixels_HWC).resize((side, side), PilImage.Resampling.LANCZOS))
