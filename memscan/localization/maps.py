"""This module makes localisation maps (B, h, w) over latents x_t under captions; higher means more memorised.

A memorised coordinate has next to no variance left, so that the log-density of x_t is steeply curved along it: a large
-d^2 log p / dx_i^2. What the model has there without the caption is subtracted, or what an earlier checkpoint has
(arXiv 2605.26756, 2026). Maps are sums over latent channels, negative ones set to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memscan.models.attention import AttentionRecorder, end_map
from memscan.models.denoiser import Denoiser, Level
from memscan.models.text import Text

PROBES = 16  # K of Hutchinson's estimator, as published


def hutchinson(function: Callable[[Tensor], Tensor], x_BCHW: Tensor, *, probes: int = PROBES, seed: int = 0) -> Tensor:
    """Estimate the diagonal of d function / d x, row by row, with the shape of x.

    Mean over Rademacher vectors v of v * grad <function(x), v> (Bekas, Kokiopoulou and Saad 2007). Unbiased; exact
    where the Jacobian is diagonal.
    """
    source = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(x_BCHW)
    with torch.enable_grad():
        point = x_BCHW.detach().clone().requires_grad_()
        value = function(point)
        for number in range(probes):
            signs = torch.randint(0, 2, x_BCHW.shape, generator=source).to(x_BCHW) * 2 - 1
            (gradient,) = torch.autograd.grad(value, point, signs, retain_graph=number + 1 < probes)
            total += signs * gradient
    return total / probes


@dataclass(frozen=True)
class Point:
    """This holds latents near the end of a sampling, where maps are computed.

    Args:
        x_BCHW: x_t as the denoiser saw it, float32.
        text: captions, one per row.
        empty: the empty caption (N = 1); None without guidance.
    """

    x_BCHW: Tensor
    level: Level
    text: Text
    empty: Text | None

    def conditions(self) -> Text:
        """Return the empty caption for every row. Raises ValueError without guidance."""
        if self.empty is None:
            raise ValueError("no unconditional prediction: guidance is off")
        return self.empty[[0] * len(self.x_BCHW)]


def score_difference(denoiser: Denoiser, point: Point) -> Tensor:
    """Return (s_c - s_u)^2, which guided sampling has at every step without further calls."""
    with torch.no_grad():
        cond = denoiser.epsilon(point.x_BCHW, point.level, point.text)
        uncond = denoiser.epsilon(point.x_BCHW, point.level, point.conditions())
    return ((cond - uncond) / point.level.sigma).square().sum(dim=1)


def checkpoint_difference(denoiser: Denoiser, earlier: Denoiser, point: Point) -> Tensor:
    """Return (s_c - s_c')^2 with s_c' of a less trained checkpoint."""
    with torch.no_grad():
        ours, theirs = (one.epsilon(point.x_BCHW, point.level, point.text) for one in (denoiser, earlier))
    return ((ours - theirs) / point.level.sigma).square().sum(dim=1)


def curvature(denoiser: Denoiser, point: Point, *, probes: int = PROBES) -> Tensor:
    """Return diag(-H) under the caption, with nothing subtracted."""
    return _positive(_curvature(denoiser, point, point.text, probes))


def caption_curvature(denoiser: Denoiser, point: Point, *, probes: int = PROBES) -> Tensor:
    """Return diag(-H) under the caption minus diag(-H) without it."""
    empty = point.conditions()
    return _positive(_curvature(denoiser, point, point.text, probes) - _curvature(denoiser, point, empty, probes))


def checkpoint_curvature(denoiser: Denoiser, earlier: Denoiser, point: Point, *, probes: int = PROBES) -> Tensor:
    """Return diag(-H) under the caption minus that of a less trained checkpoint."""
    ours, theirs = (_curvature(one, point, point.text, probes) for one in (denoiser, earlier))
    return _positive(ours - theirs)


def bright_ending(denoiser: Denoiser, point: Point, ends_B: Tensor) -> Tensor:
    """Return the cross-attention to the first end token (Chen et al. 2025).

    It is averaged over heads and the first two layers down.

    Args:
        ends_B: position of every caption's first end token, int64.
    """
    with torch.no_grad(), AttentionRecorder(denoiser.unet) as recorder:
        denoiser.output(point.x_BCHW, point.level, point.text)
        layers = recorder.take()[:2]
    return end_map(layers, ends_B, (point.x_BCHW.shape[2], point.x_BCHW.shape[3]))


def _curvature(denoiser: Denoiser, point: Point, text: Text, probes: int) -> Tensor:
    """-d s_i / d x_i = (d eps_i / d x_i) / sigma; the same probes for whatever is subtracted."""
    found = hutchinson(lambda x: denoiser.epsilon(x, point.level, text), point.x_BCHW, probes=probes)
    return found / point.level.sigma


def _positive(diagonal_BCHW: Tensor) -> Tensor:
    return diagonal_BCHW.sum(dim=1).clamp_min(0)


def foreground_share(map_HW: Tensor, mask_HW: Tensor) -> float | None:
    """Return the share of a map's mass inside a mask in [0, 1] of any size.

    It is None if the map has no mass or is not finite.
    """
    total = float(map_HW.sum())
    if not total > 0 or total == float("inf"):
        return None
    small = torch.nn.functional.interpolate(mask_HW[None, None].float(), map_HW.shape, mode="area")[0, 0]
    return float((map_HW * small).sum() / total)
