"""This module is the variant `release` of FB-Mem.

It computes the scores of the released scripts of Di et al. 2025, for published figures.

`paper` is the formula as it is written. The scripts behind the published figures (5_compute_segments.py, 6_bg_scores.py
and archive/check_mem.py of github.com/Jimmy-di/localizing_memorization_in_diffusion_models at 198fc29) differ from it,
and everything that they do is kept here, so that a published number and one of ours are in one unit (docs/parity.md):

* The training image's foreground is an RGBA file whose alpha is its mask; a generation's comes back opaque.
* Backgrounds are filled as (1 - m) x + m^2 255, so that a soft border is darker than white.
* A generation's cut images are cached as JPEG files of Pillow's usual quality.
* MS-SSIM gets no data range and takes, again at every scale, the greater of both images' ranges, alpha included.
* A generation whose background is nearly white: its *foreground* is compared with the training image's background.
  Else, where its foreground is nearly black, its background is compared with the training image's foreground.
* A training image whose cut image is nearly white or black is used uncut.
* No region counts as missing: the score of every region is compared with its own threshold.

Of the first training image that a generation is compared with, the scripts take the generation's foreground with its
alpha, since it is not cached yet; here it is opaque as for every other one.
"""

from __future__ import annotations

import io
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
from memscan.metric.regions import Image, Mask
from memscan.metric.ssim import SCALES, combine_scales, contrast_map, level_of, luminance_map


@dataclass(frozen=True)
class ReleasedImages:
    """These are one image's canvases, RGBA in [0, 1], (1, 4, H, W) float32.

    Attributes:
        whole: opaque.
        generated_foreground, generated_background: opaque, as the scripts read a generation's; one of them stands for
            both where the other one is empty.
        reference_foreground, reference_background: as they read a training image's: the foreground with the mask as
            alpha, and the whole image in place of one that is empty.
        foreground_area: mean of the mask, in [0, 1].
        nearly_black, nearly_white: whether more than 97 % of the foreground or background is.
    """

    whole: Tensor
    generated_foreground: Tensor
    generated_background: Tensor
    reference_foreground: Tensor
    reference_background: Tensor
    foreground_area: float
    nearly_black: bool
    nearly_white: bool

    @property
    def nbytes(self) -> int:
        """This is the memory that is held, in bytes: 20 MiB on a canvas of 512."""
        generated = self.generated_foreground, self.generated_background
        tensors = (self.whole, *generated, self.reference_foreground, self.reference_background)
        return sum(t.element_size() * t.nelement() for t in tensors)


class ReleaseFbMem(FbMem[ReleasedImages]):
    """This is the metric of the released scripts. Labels and matching are those of `FbMem`."""

    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> ReleasedImages:
        """Cut, fill and resize an image; arguments and errors as `FbMem.prepare`."""
        mask = self._checked(image_HWC, mask_HW)
        assert mask is not None  # the configuration has no `masks: reference` for filled canvases
        side = self.config.canvas
        alpha = PilImage.fromarray(np.rint(mask * 255).astype(np.uint8))
        picture = PilImage.fromarray(image_HWC)
        foreground = PilImage.composite(picture.convert("RGBA"), PilImage.new("RGBA", picture.size, 0), alpha)
        background = picture.copy()
        background.paste(alpha.convert("RGB"), mask=alpha)
        whole = self._canvas(images.resize(image_HWC, (side, side)))
        black, white = self._empty(foreground.convert("RGB"), background)
        reference = [
            whole if empty else self._canvas(_resized(cut, side))
            for cut, empty in ((foreground, black), (background, white))
        ]
        cached = [_as_jpeg(cut) for cut in (foreground.convert("RGB"), background)]
        generated = [self._canvas(_resized(cut, side)) for cut in cached]
        own_black, own_white = self._empty(*cached)
        if own_white:
            generated[1] = generated[0]
        elif own_black:
            generated[0] = generated[1]
        empty = black or own_black, white or own_white
        area = float(mask.mean(dtype=np.float64))
        return ReleasedImages(whole, generated[0], generated[1], reference[0], reference[1], area, *empty)

    def _empty(self, foreground: PilImage.Image, background: PilImage.Image) -> tuple[bool, bool]:
        """Return whether a cut image is empty: nearly black, and nearly white, in grey."""
        least = 1 - self.config.degenerate_area
        black, white = (np.asarray(cut.convert("L")) / 255 for cut in (foreground, background))
        return bool((black < NEAR_BLACK).mean() > least), bool((white > NEAR_WHITE).mean() > least)

    def _canvas(self, pixels_HWC: Image) -> Tensor:
        canvas = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).to(self.device).permute(2, 0, 1)[None]
        canvas = canvas.to(torch.float32).div(255)
        opaque = torch.ones_like(canvas[:, :1])
        return canvas if canvas.shape[1] == 4 else torch.cat([canvas, opaque], dim=1)

    def score(self, generated: ReleasedImages, references: Sequence[ReleasedImages]) -> list[RegionScores]:
        """Return scores of one generated image against each reference, in their order."""
        return [self._scored(generated, reference) for reference in references]

    def _scored(self, generated: ReleasedImages, reference: ReleasedImages) -> RegionScores:
        areas = generated.foreground_area, reference.foreground_area
        empty = {
            "foreground": generated.nearly_black or reference.nearly_black,
            "background": generated.nearly_white or reference.nearly_white,
        }
        return RegionScores(
            released_ms_ssim(generated.generated_foreground, reference.reference_foreground),
            released_ms_ssim(generated.generated_background, reference.reference_background),
            released_ms_ssim(generated.whole, reference.whole),
            min(areas),
            1 - max(areas),
            copied=tuple(name for name, is_empty in empty.items() if is_empty),
        )

    def maps(self, generated: ReleasedImages, reference: ReleasedImages) -> dict[str, Tensor]:
        """Return contrast-structure of both filled canvases at the finest scale, range 1, as the mean over RGB."""
        pairs = {
            "filled foregrounds": (generated.generated_foreground, reference.reference_foreground),
            "filled backgrounds": (generated.generated_background, reference.reference_background),
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


def _resized(picture: PilImage.Image, side: int) -> Image:
    """Return the image resized with Lanczos; Pillow multiplies an RGBA image by its alpha while it does so."""
    return np.array(picture.resize((side, side), PilImage.Resampling.LANCZOS))


def _as_jpeg(picture: PilImage.Image) -> PilImage.Image:
    """Return the image as it comes back from a JPEG file of Pillow's usual quality."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return PilImage.open(buffer)
