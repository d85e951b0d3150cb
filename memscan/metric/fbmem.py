"""FB-Mem, variant `paper`: Algorithm 1 of Di et al. 2025 (arXiv 2508.12148) as its authors run it.

Each image is cut by its own mask into a foreground on black and a background on white; both are resized to one square
canvas and compared with MS-SSIM. A generated region that is nearly all fill has no score of its own. Two thresholds on
the two scores give the label: VM verbatim, BM background, FM foreground, NM none.

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

from memscan import images
from memscan.config import MetricConfig
from memscan.metric.regions import Image, Mask, check_mask, compose_background, compose_foreground
from memscan.metric.ssim import PreparedStack, combine_scales, compare, prepare_stack
from memscan.records import Label

NEAR_WHITE = 0.97
NEAR_BLACK = 0.03

# Of (whole, foreground, background), RGB each: the fill where there is one, so that filled pixels become exact zeros.
_OFFSETS = (0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
_SEVERITY = {label: rank for rank, label in enumerate(reversed(Label))}


@dataclass(frozen=True)
class RegionScores:
    """MS-SSIM of a pair's regions, each in [0, 1]. `whole` is reported beside the others and decides nothing."""

    foreground: float
    background: float
    whole: float


@dataclass(frozen=True)
class Prepared:
    """An image ready to be compared: everything that does not depend on the other image of a pair.

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
        """Memory held: 3.8 MiB on a canvas of 176 px, 35 MiB on one of 512; for caches with a budget."""
        return self.stack.nbytes


class FbMem:
    """The metric under one configuration.

    Args:
        config: canvas, thresholds and the share under which a region is degenerate.
        device: where images are prepared and compared.
    """

    def __init__(self, config: MetricConfig, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    def prepare(self, image_HWC: Image, mask_HW: Mask) -> Prepared:
        """Cut, fill and resize an image and compute its moments; do this once per image.

        Args:
            image_HWC: uint8 RGB of any size; it is resized to the canvas without keeping its aspect.
            mask_HW: foreground in [0, 1], of the image's size.

        Raises:
            ValueError: shapes, dtypes or the mask's range are wrong.
            RowReject: the mask is not finite (`segmentation_failed`).
        """
        mask = check_mask(image_HWC, mask_HW)
        regions = (image_HWC, compose_foreground(image_HWC, mask), compose_background(image_HWC, mask))
        side = self.config.canvas
        whole, foreground, background = (images.resize(region, (side, side)) for region in regions)
        pixels = torch.from_numpy(np.concatenate([whole, foreground, background], axis=2)).to(self.device)
        canvas_BCHW = pixels[None].permute(0, 3, 1, 2).to(torch.float32).div_(255)
        filled = 1 - self.config.degenerate_area
        return Prepared(
            stack=prepare_stack(canvas_BCHW, offset_C=torch.tensor(_OFFSETS)),
            foreground_area=float(mask.mean(dtype=np.float64)),
            foreground_degenerate=bool((foreground < NEAR_BLACK * 255).all(axis=2).mean() > filled),
            background_degenerate=bool((background > NEAR_WHITE * 255).all(axis=2).mean() > filled),
        )

    def score(self, generated: Prepared, references: Sequence[Prepared]) -> list[RegionScores]:
        """Scores of one generated image against each reference, in their order.

        A degenerate region of the generated image takes the other region's score; where both are degenerate (a
        generated image that is blank where it is not cut away) both take the score of the whole image.
        """
        if not references:
            return []
        terms_NSC = compare(generated.stack, [reference.stack for reference in references])
        return [_substitute(generated, *row) for row in _region_scores(terms_NSC).tolist()]

    def classify(self, scores: RegionScores) -> Label:
        """The label of a pair, in the order VM, BM, FM, NM; a score that equals its threshold fires."""
        foreground = scores.foreground >= self.config.foreground_threshold
        background = scores.background >= self.config.background_threshold
        if foreground and background:
            return Label.VM
        if background:
            return Label.BM
        return Label.FM if foreground else Label.NM

    def margin(self, scores: RegionScores) -> float:
        """Distance of the deciding score from its threshold: at least 0 for VM, BM and FM, below 0 for NM.

        VM needs both scores, so the weaker one decides; NM is as far as the better one is from firing.
        """
        foreground = scores.foreground - self.config.foreground_threshold
        background = scores.background - self.config.background_threshold
        label = self.classify(scores)
        if label is Label.VM:
            return min(foreground, background)
        if label is Label.NM:
            return max(foreground, background)
        return foreground if label is Label.FM else background

    def match(self, scores: Sequence[RegionScores]) -> tuple[int, Label]:
        """The candidate that decides a generation's label: the most severe label, then the larger sum of both scores.

        Every candidate is classified: choosing the best average first, as the authors do, can hide a foreground-only
        match behind a candidate that resembles a little everywhere. Equal candidates: the first.

        Raises:
            ValueError: no candidates.
        """
        if not scores:
            raise ValueError("no candidates to match")
        labels = [self.classify(candidate) for candidate in scores]

        def order(index: int) -> tuple[int, float]:
            return _SEVERITY[labels[index]], scores[index].foreground + scores[index].background

        best = max(range(len(scores)), key=order)
        return best, labels[best]


def _region_scores(terms_NSC: Tensor) -> Tensor:
    """MS-SSIM (N, 3) of whole, foreground and background, as RGBA with a constant alpha."""
    count, scales, channels = terms_NSC.shape
    rgb_NSR = terms_NSC.view(count, scales, channels // 3, 3).mean(dim=3)
    rgba_NRS = ((3 * rgb_NSR + 1) / 4).transpose(1, 2)
    return combine_scales(rgba_NRS.reshape(-1, scales)).view(count, -1).clamp_(max=1)


def _substitute(generated: Prepared, whole: float, foreground: float, background: float) -> RegionScores:
    if generated.foreground_degenerate and generated.background_degenerate:
        return RegionScores(whole, whole, whole)
    if generated.foreground_degenerate:
        return RegionScores(background, background, whole)
    if generated.background_degenerate:
        return RegionScores(foreground, foreground, whole)
    return RegionScores(foreground, background, whole)
