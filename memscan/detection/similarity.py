"""This module computes NeMo's memorisation score: how similar a prompt's first noise predictions are from seed to seed.

delta = eps_θ(x_T, T, y) - x_T without guidance, for several seeds, scaled to [0, 1] per channel. Where every seed leads
to the same image, the deltas show the same structure, and MS-SSIM between them is high (Hintersdorf et al. 2024, NeMo,
section 3.2). The detector `seed_similarity` and the search of `memscan.mitigation.nemo` take it from here.

Published deltas have 64 x 64 positions, MS-SSIM a window of 11, σ 1.5, and three scales with weight .33. Smaller
latents get a window of the same share of their side (at least 3) and as many scales as it fits into. Scores of
different sizes are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memscan.metric.ssim import C1, C2, SIGMA, WINDOW

SCALES, WEIGHT, PUBLISHED_SIDE = 3, 0.33, 64


@dataclass(frozen=True)
class Window:
    """This holds the side of the window (odd) and the number of scales of MS-SSIM for a size of latents."""

    side: int
    scales: int

    @classmethod
    def fitting(cls, height: int, width: int) -> Window:
        """Return the published window for 64 positions or more, and one in proportion below.

        Raises ValueError below 3 positions.
        """
        short = min(height, width)
        if short < 3:
            raise ValueError(f"latents of {height} x {width} are too small for a window of 3")
        side = min(WINDOW, max(3, int(short * WINDOW / PUBLISHED_SIDE) // 2 * 2 + 1))
        scales = next(scales for scales in range(SCALES, 0, -1) if short // 2 ** (scales - 1) >= side)
        return cls(side, scales)


def unit_range(delta_BCHW: Tensor) -> Tensor:
    """Return each channel of each image scaled to [0, 1]; a constant channel becomes 0."""
    low, high = delta_BCHW.amin(dim=(2, 3), keepdim=True), delta_BCHW.amax(dim=(2, 3), keepdim=True)
    return (delta_BCHW - low) / (high - low).clamp_min(torch.finfo(delta_BCHW.dtype).tiny)


def similarity(a_BCHW: Tensor, b_BCHW: Tensor, window: Window) -> Tensor:
    """Return MS-SSIM of pairs in [0, 1], (B,), with data range 1.

    It is the mean over channels and positions; borders are treated as in torchmetrics.

    Scales are weighted by .33 each where there are three, as published, and by 1 / scales where fewer fit.
    """
    weight = WEIGHT if window.scales == SCALES else 1 / window.scales
    product = torch.ones(len(a_BCHW), dtype=a_BCHW.dtype, device=a_BCHW.device)
    for scale in range(window.scales):
        last = scale == window.scales - 1
        terms = _terms(a_BCHW, b_BCHW, window.side, with_luminance=last)
        product = product * torch.relu(terms).pow(weight)
        a_BCHW, b_BCHW = F.avg_pool2d(a_BCHW, 2), F.avg_pool2d(b_BCHW, 2)
    return product


def pairwise(deltas_SCHW: Tensor, window: Window) -> Tensor:
    """Return the similarity of every pair of seeds, symmetric (S, S), on the host, 0 on the diagonal.

    The deltas lie in [0, 1].
    """
    count = len(deltas_SCHW)
    first, second = torch.triu_indices(count, count, offset=1).unbind()
    values = similarity(deltas_SCHW[first], deltas_SCHW[second], window)
    matrix = torch.zeros(count, count, dtype=values.dtype)
    matrix[first, second] = values.cpu()
    return matrix + matrix.T


def mean_similarity(matrix_SS: Tensor) -> float:
    """Return the mean over all pairs of different seeds of what `pairwise` gives: high for a memorised prompt."""
    count = len(matrix_SS)
    return float(matrix_SS.sum() / (count * (count - 1)))


def seed_similarity(delta_PSCHW: Tensor) -> Tensor:
    """Return the score of P prompts from their deltas under S seeds, (P,) float32 on the host.

    Raises:
        ValueError: fewer than two seeds, or latents of less than 3 x 3 positions.
    """
    if delta_PSCHW.shape[1] < 2:
        raise ValueError("the similarity of seeds needs two of them")
    window = Window.fitting(*delta_PSCHW.shape[-2:])
    return torch.tensor([mean_similarity(pairwise(unit_range(deltas), window)) for deltas in delta_PSCHW])


def _terms(a: Tensor, b: Tensor, side: int, *, with_luminance: bool) -> Tensor:
    channels, pad = a.shape[1], side // 2
    distance = torch.arange(side, dtype=a.dtype, device=a.device) - pad
    line = torch.exp(-((distance / (SIGMA * side / WINDOW)) ** 2) / 2)
    kernel = torch.outer(line, line).div(line.sum() ** 2).expand(channels, 1, side, side)
    if with_luminance:  # torchmetrics takes contrast terms on the valid part, and the last scale's SSIM padded
        a, b = (F.pad(x, (pad,) * 4, mode="reflect") for x in (a, b))
    stack = torch.cat([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = F.conv2d(stack, kernel, groups=channels).chunk(5)
    variance = (square_a - mean_a**2).clamp_min(0) + (square_b - mean_b**2).clamp_min(0)
    result = (2 * (product - mean_a * mean_b) + C2) / (variance + C2)
    if with_luminance:
        result = result * (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return result.flatten(1).mean(dim=1)
