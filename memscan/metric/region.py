"""This module is the variant `region` of FB-Mem.

It makes the same labels from one SSIM map of the unfilled images, averaged inside the regions.

Constant fill inflates the published scores: unrelated content under one silhouette scores .82 at a foreground of 20 %
of the image, and a background with a differently shaped hole scores low although it is the same. Here the
contrast-structure map of each scale is computed once, on the images as they are, and averaged with weights:

* background: where *both* images are background. What one object hides cannot be compared, and must not count.
* foreground: where *either* image is foreground. An object of another shape must count as different.

With g the Gaussian-filtered mask of each image at that scale, (1 - g_a)(1 - g_b) is a window's share of common
background. Windows count from a share of .7 upwards, so that those astride a border, which see both regions, do not;
and a region counts only at the scales at which windows fit into it, the coarsest of them with its luminance. The
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

from memscan.config import MetricConfig
from memscan.io import images
from memscan.metric.fbmem import FbMem, RegionScores, region_scores
from memscan.metric.regions import Image, Mask
from memscan.metric.ssim import (
    WEIGHTS,
    WINDOW,
    PreparedStack,
    batched,
    concatenate,
    contrast_map,
    luminance_map,
    prepare_stack,
)
from memscan.metric.ssim import gaussian_filter as _filter

WIDEST_WINDOW = 0.35  # of the canvas side
# Windows with less of a region than this see too much of the other one. Of weights that begin at .5, .7 and .8, linear
# and squared, this one told copies on another background from other objects best (docs/metric.md).
ASTRIDE = 0.7
# Mean weight from which a scale counts for a region: below it no window is left inside.
ROOM = 0.01
# At the finest scale: a region of a few slivers has no score of its own.
LEAST_ROOM = 0.002


@dataclass(frozen=True)
class PreparedRegions:
    """This is an image that is ready to be compared.

    It has the moments of RGB and, per scale, each window's share of background (1, 1, H, W).

    Without a mask of its own (`metric.masks: reference`) it has no shares and no area.
    """

    stack: PreparedStack
    outside: tuple[Tensor, ...]
    foreground_area: float | None

    @property
    def nbytes(self) -> int:
        """This is the memory that is held, in bytes."""
        return self.stack.nbytes + sum(share.element_size() * share.nelement() for share in self.outside)


@dataclass(frozen=True)
class _Weights:
    """Of one scale, for N candidates in batches.

    Attributes:
        maps: each batch's weights of foreground and background windows (N, 2, H, W).
        room_NR: mean weight of whole, foreground and background.
        area_NR: share of the windows' area that whole, foreground and background have.
    """

    maps: list[Tensor]
    room_NR: Tensor
    area_NR: Tensor


class RegionFbMem(FbMem[PreparedRegions]):
    """This is the metric with region means. Arguments, labels and matching are those of `FbMem`."""

    def __init__(self, config: MetricConfig, device: str | torch.device = "cpu") -> None:
        super().__init__(config, device)
        self.scales = scales_of(config.canvas)
        weights = torch.tensor(WEIGHTS[: self.scales])
        self._exponents_S = (weights / weights.sum()).to(self.device)

    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> PreparedRegions:
        """Return moments of the unfilled image and window shares of its mask.

        Arguments and errors are those of `FbMem.prepare`.
        """
        mask = self._checked(image_HWC, mask_HW)
        side = self.config.canvas
        canvas = torch.from_numpy(images.resize(image_HWC, (side, side))).to(self.device)
        stack = prepare_stack(canvas.permute(2, 0, 1)[None].float().div_(255), scales=self.scales)
        if mask is None:
            return PreparedRegions(stack, (), None)
        mask_11HW = torch.from_numpy(mask).to(self.device)[None, None]
        mask_11HW = functional.interpolate(mask_11HW, (side, side), mode="bilinear", antialias=True).clamp_(0, 1)
        return PreparedRegions(stack, _outside(mask_11HW, self.scales), float(mask.mean(dtype=np.float64)))

    def score(self, generated: PreparedRegions, references: Sequence[PreparedRegions]) -> list[RegionScores]:
        """Return the scores of one generated image against each reference, in their order.

        A region that fills less than `degenerate_area` of either image has no score of its own and takes the other's;
        where neither has one, both take the score of the whole image.
        """
        if not references:
            return []
        weights = [self._weights(generated, references, scale) for scale in range(self.scales)]
        room_SNR = torch.stack([level.room_NR for level in weights])
        last_NR = _last_scale(room_SNR)
        scores_NR = self._combined(self._terms(generated, references, weights, last_NR), last_NR)
        small_NR = (weights[0].area_NR < self.config.degenerate_area) | (room_SNR[0] < LEAST_ROOM)
        small_NR[:, 1] |= torch.tensor([self._no_foreground(generated, other) for other in references]).to(self.device)
        rows = zip(scores_NR.tolist(), small_NR.tolist(), weights[0].area_NR.tolist(), strict=True)
        return [region_scores(*row, *small[1:], *area[1:]) for row, small, area in rows]

    def maps(self, generated: PreparedRegions, reference: PreparedRegions) -> dict[str, Tensor]:
        """Return contrast-structure of the uncut images at the finest scale, and SSIM at the coarsest."""
        fine, coarse = (contrast_map(generated.stack.levels[scale], reference.stack.levels[scale]) for scale in (0, -1))
        levels = generated.stack.levels[-1], reference.stack.levels[-1]
        shade = luminance_map(*levels, generated.stack.offset_C)
        return {"structure, finest scale": fine[0].mean(0), "SSIM, coarsest scale": (coarse * shade)[0].mean(0)}

    def _no_foreground(self, generated: PreparedRegions, reference: PreparedRegions) -> bool:
        """Whether one of the images has none: what is object in one and not in the other is no foreground of both."""
        own = None if self.config.masks == "reference" else generated.foreground_area
        areas = [area for area in (own, reference.foreground_area) if area is not None]
        return min(areas) < self.config.degenerate_area

    def _weights(self, generated: PreparedRegions, references: Sequence[PreparedRegions], scale: int) -> _Weights:
        """Of every window at one scale, for all candidates."""
        own = generated.outside[scale] if generated.outside and self.config.masks == "own" else None
        batches = [
            _common(own, torch.cat([reference.outside[scale] for reference in batch]))
            for batch in batched(references, generated.stack.levels[scale].values_BCHW)
        ]
        common_N = torch.cat([common.mean((1, 2, 3)) for common in batches])
        maps = [torch.cat([_inside(1 - common), _inside(common)], dim=1) for common in batches]
        room_N2 = torch.cat([map_N2HW.mean((2, 3)) for map_N2HW in maps])
        whole_N = torch.ones_like(common_N)
        return _Weights(
            maps=maps,
            room_NR=torch.cat([whole_N[:, None], room_N2], dim=1),
            area_NR=torch.stack([whole_N, 1 - common_N, common_N], dim=1),
        )

    def _terms(
        self,
        generated: PreparedRegions,
        references: Sequence[PreparedRegions],
        weights: Sequence[_Weights],
        last_NR: Tensor,
    ) -> Tensor:
        """Mean map per candidate, scale and region (N, S, 3): SSIM at a region's last scale, contrast before it."""
        terms = []
        for scale, level in enumerate(generated.stack.levels):
            ends_NR = last_NR == scale
            batches = batched([reference.stack.levels[scale] for reference in references], level.values_BCHW)
            means, start = [], 0
            for batch, map_N2HW in zip(batches, weights[scale].maps, strict=True):
                ends = ends_NR[start : start + len(batch)]
                start += len(batch)
                others = concatenate(batch)
                map_NCHW = contrast_map(level, others)
                means_NR = _mean(map_NCHW, map_N2HW)
                if bool(ends.any()):
                    shade_NCHW = luminance_map(level, others, generated.stack.offset_C)
                    means_NR = torch.where(ends, _mean(map_NCHW.mul_(shade_NCHW), map_N2HW), means_NR)
                means.append(means_NR)
            terms.append(torch.cat(means))
        return torch.stack(terms, dim=1)

    def _combined(self, terms_NSR: Tensor, last_NR: Tensor) -> Tensor:
        """Weighted geometric mean over each region's scales, (N, 3) in [0, 1]."""
        scales = torch.arange(self.scales, device=last_NR.device)
        exponents_NSR = self._exponents_S[None, :, None] * (scales[None, :, None] <= last_NR[:, None, :])
        exponents_NSR = exponents_NSR / exponents_NSR.sum(1, keepdim=True)
        return torch.prod(torch.relu(terms_NSR) ** exponents_NSR, dim=1).clamp_(max=1)


def _common(own: Tensor | None, others: Tensor) -> Tensor:
    """Return a window's share of common background; an image without a mask of its own has the other's."""
    return others * (others if own is None else own)


def scales_of(canvas: int) -> int:
    """Return for how many of the five published scales a canvas has room."""
    fitting = [s for s in range(1, len(WEIGHTS) + 1) if WINDOW * 2 ** (s - 1) <= WIDEST_WINDOW * canvas]
    return max(fitting, default=1)


def _outside(mask_11HW: Tensor, scales: int) -> tuple[Tensor, ...]:
    """Window shares of background on the grids of `prepare_stack`'s moments: valid parts, the last scale padded."""
    shares = []
    for scale in range(scales):
        last = scale == scales - 1
        pad = WINDOW // 2
        shares.append(1 - _filter(functional.pad(mask_11HW, (pad,) * 4, mode="reflect") if last else mask_11HW))
        mask_11HW = functional.avg_pool2d(mask_11HW, 2)
    return tuple(shares)


def _inside(share: Tensor) -> Tensor:
    """Weight of a window by its share of the region: 0 up to `ASTRIDE`, then rising to 1 as a square."""
    above = (share - ASTRIDE).clamp_(min=0).div_(1 - ASTRIDE)
    return above.mul_(above)


def _mean(map_NCHW: Tensor, weights_N2HW: Tensor) -> Tensor:
    """Mean of a map over channels: plain, and with each region's weights; (N, 3), 0 if a region has no weight."""
    # A reduction over the innermost of channels-last is sevenfold slower than adding the channels up.
    red, green, blue = map_NCHW.unbind(1)
    grey_NP = (red + green).add_(blue).div_(3).flatten(1)
    weights_N2P = weights_N2HW.flatten(2)
    means_N2 = torch.bmm(weights_N2P, grey_NP[:, :, None])[:, :, 0] / weights_N2P.sum(2).clamp(min=1e-12)
    return torch.cat([grey_NP.mean(1, keepdim=True), means_N2], dim=1)


def _last_scale(room_SNR: Tensor) -> Tensor:
    """Return the coarsest scale at which a region has room for its windows, (N, 3); the finest one always counts."""
    roomy_SNR = (room_SNR >= ROOM).cumprod(0)
    return (roomy_SNR.sum(0) - 1).clamp(min=0)
