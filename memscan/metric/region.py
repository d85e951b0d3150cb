"""FB-Mem, variant `region`: the same labels from one SSIM map of the unfilled images, averaged inside the regions.

Constant fill inflates the published scores: unrelated content under one silhouette scores .82 at a foreground of 20 %
of the image, and a background with a differently shaped hole scores low although it is the same. Here the
contrast-structure map of each scale is computed once, on the images as they are, and averaged with weights:

* background: where *both* images are background. What one object hides cannot be compared, and must not count.
* foreground: where *either* image is foreground. An object of another shape must count as different.

With g the Gaussian-filtered mask of each image at that scale, (1 - g_a)(1 - g_b) is a window's share of common
background; windows count from a half upwards, so that those astride a border, which see both regions, do not. The
published five scales belong to a canvas of 512, where the widest window spans 0.34 of the side. Smaller canvases
take as many scales as keep it below 0.35, with the published exponents normalised over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from memscan import images
from memscan.config import MetricConfig
from memscan.metric.fbmem import FbMem, RegionScores
from memscan.metric.regions import Image, Mask, check_mask
from memscan.metric.ssim import WEIGHTS, WINDOW, Level, PreparedStack, contrast_map, luminance_map, prepare_stack
from memscan.metric.ssim import gaussian_filter as _filter

WIDEST_WINDOW = 0.35  # of the canvas side


@dataclass(frozen=True)
class PreparedRegions:
    """An image ready to be compared: its RGB moments, and per scale each window's share of foreground (1, 1, H, W)."""

    stack: PreparedStack
    shares: tuple[Tensor, ...]
    foreground_area: float

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.stack.nbytes + sum(share.element_size() * share.nelement() for share in self.shares)


class RegionFbMem(FbMem):
    """The metric with region means. Arguments, labels and matching as `FbMem`."""

    def __init__(self, config: MetricConfig, device: str | torch.device = "cpu") -> None:
        super().__init__(config, device)
        self.scales = scales_of(config.canvas)
        weights = torch.tensor(WEIGHTS[: self.scales])
        self._exponents_S = (weights / weights.sum()).to(self.device)

    def prepare(self, image_HWC: Image, mask_HW: Mask) -> PreparedRegions:  # type: ignore[override]
        """Moments of the unfilled image and window shares of its mask; arguments and errors as `FbMem.prepare`."""
        mask = check_mask(image_HWC, mask_HW)
        side = self.config.canvas
        canvas = torch.from_numpy(images.resize(image_HWC, (side, side))).to(self.device)
        stack = prepare_stack(canvas.permute(2, 0, 1)[None].float().div_(255), scales=self.scales)
        mask_11HW = torch.from_numpy(mask).to(self.device)[None, None]
        mask_11HW = functional.interpolate(mask_11HW, (side, side), mode="bilinear", antialias=True).clamp_(0, 1)
        return PreparedRegions(stack, _shares(mask_11HW, self.scales), float(mask.mean(dtype=np.float64)))

    def score(  # type: ignore[override]
        self, generated: PreparedRegions, references: Sequence[PreparedRegions]
    ) -> list[RegionScores]:
        """Scores of one generated image against each reference, in their order.

        A region that fills less than `degenerate_area` of the pair has no score of its own and takes the other's;
        where neither has one, both take the score of the whole image.
        """
        if not references:
            return []
        terms_NSR, area_NR = self._terms(generated, references)
        scores_NR = torch.prod(torch.relu(terms_NSR) ** self._exponents_S[None, :, None], dim=1).clamp_(max=1)
        small_NR = area_NR < self.config.degenerate_area
        return [_substitute(*row, *small) for row, small in zip(scores_NR.tolist(), small_NR.tolist(), strict=True)]

    def _terms(self, generated: PreparedRegions, references: Sequence[PreparedRegions]) -> tuple[Tensor, Tensor]:
        """Mean map per candidate, scale and region (whole, foreground, background); areas at the finest scale."""
        terms, area = [], torch.empty(0)
        for scale, level in enumerate(generated.stack.levels):
            others = _joined([reference.stack.levels[scale] for reference in references])
            map_NCHW = contrast_map(level, others)
            if scale == self.scales - 1:
                map_NCHW = map_NCHW * luminance_map(level, others, generated.stack.offset_C)
            map_N1HW = map_NCHW.mean(1, keepdim=True)
            common = torch.cat([1 - reference.shares[scale] for reference in references]) * (
                1 - generated.shares[scale]
            )
            weights = torch.cat([torch.ones_like(common), _majority(1 - common), _majority(common)], dim=1)
            if scale == 0:
                area = weights.mean((2, 3))
            terms.append((map_N1HW * weights).sum((2, 3)) / weights.sum((2, 3)).clamp(min=1e-12))
        return torch.stack(terms, dim=1), area


def load_metric(config: MetricConfig, device: str | torch.device = "cpu") -> FbMem:
    """The metric that a configuration names."""
    return RegionFbMem(config, device) if config.variant == "region" else FbMem(config, device)


def scales_of(canvas: int) -> int:
    """How many of the five published scales a canvas has room for."""
    fitting = [s for s in range(1, len(WEIGHTS) + 1) if WINDOW * 2 ** (s - 1) <= WIDEST_WINDOW * canvas]
    return max(fitting, default=1)


def _shares(mask_11HW: Tensor, scales: int) -> tuple[Tensor, ...]:
    """Window shares on the grids that `prepare_stack` gives the moments: valid parts, the last scale padded."""
    shares = []
    for scale in range(scales):
        last = scale == scales - 1
        pad = WINDOW // 2
        shares.append(_filter(functional.pad(mask_11HW, (pad,) * 4, mode="reflect") if last else mask_11HW))
        mask_11HW = functional.avg_pool2d(mask_11HW, 2)
    return tuple(shares)


def _majority(share: Tensor) -> Tensor:
    """Weight of a window: 0 up to a half, then rising to 1; a trace of the share where no window has a majority."""
    return (2 * share - 1).clamp(min=0) + 1e-6 * share


def _joined(levels: Sequence[Level]) -> Level:
    return Level(
        torch.cat([level.values_BCHW for level in levels]),
        torch.cat([level.mean_BCHW for level in levels]),
        torch.cat([level.spread_BCHW for level in levels]),
    )


def _substitute(whole: float, foreground: float, background: float, *small: bool) -> RegionScores:
    _, no_foreground, no_background = small
    if no_foreground and no_background:
        return RegionScores(whole, whole, whole)
    if no_foreground:
        return RegionScores(background, background, whole)
    if no_background:
        return RegionScores(foreground, foreground, whole)
    return RegionScores(foreground, background, whole)
