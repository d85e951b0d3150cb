"""This module is the variant `paper` of FB-Mem.

It is Algorithm 1 of Di et al. 2025 (arXiv 2508.12148) as its authors run it.

Each image is cut by its own mask into a foreground on black and a background on white; both are resized to one square
canvas and compared with MS-SSIM. A region that is nearly all fill in either image has no score of its own. Two
thresholds on the two scores give the label: VM verbatim, BM background, FM foreground, NM none.

The authors compare RGBA tensors. We take alpha to be 1 everywhere, in both images: their composed images are opaque. A
constant channel has SSIM 1 at every pixel and scale, so it enters in closed form, (3 RGB mean + 1) / 4 per scale, and
costs nothing (a test holds this against the four-channel computation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memscan.io import images
from memscan.metric.fbmem import FbMem, RegionScores, region_scores
from memscan.metric.regions import Image, Mask, compose_background, compose_foreground
from memscan.metric.ssim import PreparedStack, combine_scales, contrast_map, prepare_stack, scale_terms

NEAR_WHITE = 0.97
NEAR_BLACK = 0.03

# Of (whole, foreground, background), RGB each: the fill where there is one, so that filled pixels become exact zeros.
_OFFSETS = (0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Canvases:
    """This is an image that is ready to be compared.

    Attributes:
        stack: whole, foreground and background canvas, RGB each, with their moments.
        foreground_area: mean of the mask, in [0, 1].
        foreground_degenerate: the foreground canvas is nearly all black.
        background_degenerate: the background canvas is nearly all white.
    """

    stack: PreparedStack
    foreground_area: float
    foreground_degenerate: bool
    background_degenerate: bool

    @property
    def nbytes(self) -> int:
        """This is the memory that is held: 3.8 MiB on a canvas of 176 px, 35 MiB on one of 512.

        Caches with a budget use it.
        """
        return self.stack.nbytes


class PaperFbMem(FbMem[Canvases]):
    """This is the published metric. Labels and matching are those of `FbMem`."""

    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> Canvases:
        """Cut, fill and resize an image and compute its moments; arguments and errors as `FbMem.prepare`."""
        mask = self._checked(image_HWC, mask_HW)
        assert mask is not None  # the configuration has no `masks: reference` for filled canvases
        regions = (image_HWC, compose_foreground(image_HWC, mask), compose_background(image_HWC, mask))
        side = self.config.canvas
        whole, foreground, background = (images.resize(region, (side, side)) for region in regions)
        pixels = torch.from_numpy(np.concatenate([whole, foreground, background], axis=2)).to(self.device)
        canvas_BCHW = pixels[None].permute(0, 3, 1, 2).to(torch.float32).div_(255)
        filled = 1 - self.config.degenerate_area
        return Canvases(
            stack=prepare_stack(canvas_BCHW, offset_C=torch.tensor(_OFFSETS)),
            foreground_area=float(mask.mean(dtype=np.float64)),
            foreground_degenerate=bool((foreground < NEAR_BLACK * 255).all(axis=2).mean() > filled),
            background_degenerate=bool((background > NEAR_WHITE * 255).all(axis=2).mean() > filled),
        )

    def score(self, generated: Canvases, references: Sequence[Canvases]) -> list[RegionScores]:
        """Return the scores of one generated image against each reference, in their order.

        A region that is degenerate in either image takes the other region's score; where both are degenerate (an image
        that is blank where it is not cut away) both take the score of the whole image.
        """
        if not references:
            return []
        terms_NSC = scale_terms(generated.stack, [reference.stack for reference in references])
        rows = zip(_region_scores(terms_NSC).tolist(), references, strict=True)
        return [
            region_scores(w, f, b, *_degenerate(generated, other), *_areas(generated, other))
            for (w, f, b), other in rows
        ]

    def maps(self, generated: Canvases, reference: Canvases) -> dict[str, Tensor]:
        """Return contrast-structure of the filled foregrounds and of the filled backgrounds, at the finest scale."""
        map_CHW = contrast_map(generated.stack.levels[0], reference.stack.levels[0])[0]
        return {"filled foregrounds": map_CHW[3:6].mean(0), "filled backgrounds": map_CHW[6:9].mean(0)}


def _degenerate(a: Canvases, b: Canvases) -> tuple[bool, bool]:
    """Return whether the pair has no foreground, no background: one image without it is enough."""
    return (
        a.foreground_degenerate or b.foreground_degenerate,
        a.background_degenerate or b.background_degenerate,
    )


def _areas(a: Canvases, b: Canvases) -> tuple[float, float]:
    """Return the smaller foreground and the smaller background, as shares of the image."""
    areas = a.foreground_area, b.foreground_area
    return min(areas), 1 - max(areas)


def _region_scores(terms_NSC: Tensor) -> Tensor:
    """MS-SSIM (N, 3) of whole, foreground and background, as RGBA with a constant alpha."""
    count, scales, channels = terms_NSC.shape
    rgb_NSR = terms_NSC.view(count, scales, channels // 3, 3).mean(dim=3)
    rgba_NRS = ((3 * rgb_NSR + 1) / 4).transpose(1, 2)
    return combine_scales(rgba_NRS.reshape(-1, scales)).view(count, -1).clamp_(max=1)
