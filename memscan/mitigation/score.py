"""NeMo's memorisation score: how alike a prompt's first noise predictions are from seed to seed (section 3.2).

delta = eps_θ(x_T, T, y) - x_T without guidance, for several seeds, scaled to [0, 1] per channel. Where every seed
leads to the same image, the deltas show the same structure, and MS-SSIM between them is high.

The paper evaluates the first timestep of the schedule; the published code evaluates the second one, still on x_T.
`Convention` has both. Published deltas have 64 x 64 positions, MS-SSIM a window of 11 and three scales with weight .33.
Smaller latents get a window of the same share of their side (at least 3) and as many scales as it fits into.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from memscan.metric.ssim import C1, C2
from memscan.mitigation.units import Layout, UnitSet, switched_off
from memscan.models.denoiser import Denoiser
from memscan.models.sampling import initial_latents
from memscan.models.schedulers import make_scheduler

Convention = Literal["first", "second"]
WINDOW, SIGMA, SCALES, WEIGHT, PUBLISHED_SIDE = 11, 1.5, 3, 0.33, 64


@dataclass(frozen=True)
class Window:
    """Window side (odd) and number of scales of MS-SSIM for a size of latents."""

    side: int
    scales: int

    @classmethod
    def fitting(cls, height: int, width: int) -> Window:
        """As published for 64 positions and more; in proportion below. Raises ValueError below 3 positions."""
        short = min(height, width)
        if short < 3:
            raise ValueError(f"latents of {height} x {width} are too small for a window of 3")
        side = min(WINDOW, max(3, int(short * WINDOW / PUBLISHED_SIDE) // 2 * 2 + 1))
        scales = next(scales for scales in range(SCALES, 0, -1) if short // 2 ** (scales - 1) >= side)
        return cls(side, scales)


def unit_range(delta_BCHW: Tensor) -> Tensor:
    """Each channel of each image scaled to [0, 1]; a constant channel becomes 0."""
    low, high = delta_BCHW.amin(dim=(2, 3), keepdim=True), delta_BCHW.amax(dim=(2, 3), keepdim=True)
    return (delta_BCHW - low) / (high - low).clamp_min(torch.finfo(delta_BCHW.dtype).tiny)


def similarity(a_BCHW: Tensor, b_BCHW: Tensor, window: Window) -> Tensor:
    """MS-SSIM of pairs, (B,), data range 1, mean over channels and positions, borders as in torchmetrics.

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


class NoiseScore:
    """The score of prompts of one model.

    Args:
        denoiser: of the model.
        layout: units that can be switched off.
        shape: of a latent, (C, h, w).
        steps: of the schedule whose first or second timestep is used.
        seeds: one latent each; at least two.
        convention: which timestep.
        scheduler_config: the checkpoint's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layout: Layout,
        shape: tuple[int, int, int],
        scheduler_config: dict[str, Any],
        *,
        steps: int = 50,
        seeds: Sequence[int] = tuple(range(10)),
        convention: Convention = "second",
    ) -> None:
        if len(seeds) < 2:
            raise ValueError("a similarity between seeds needs two of them")
        self.denoiser, self.layout = denoiser, layout
        self.window = Window.fitting(*shape[1:])
        self.noise_SCHW = initial_latents(seeds, shape)[0].to(denoiser.device)
        scheduler = make_scheduler("DDIMScheduler", scheduler_config, where="scheduler")
        scheduler.set_timesteps(steps)
        self.timestep = int(scheduler.timesteps[0 if convention == "first" or steps == 1 else 1])

    @torch.no_grad()
    def deltas(self, text_TD: Tensor, off: UnitSet | None = None, rows: Tensor | None = None) -> Tensor:
        """Scaled noise differences of one text, (S, C, h, w), with units switched off.

        Args:
            rows: seeds to take, by position; all of them by default.
        """
        noise = self.noise_SCHW if rows is None else self.noise_SCHW[rows]
        text = text_TD.to(self.denoiser.device).expand(len(noise), -1, -1)
        times = torch.full((len(noise),), self.timestep, device=self.denoiser.device)
        context = switched_off(self.denoiser.unet, self.layout, off) if off is not None and len(off) else nullcontext()
        with context:
            predicted = self.denoiser.noise(noise, times, text)
        return unit_range(predicted - noise)

    def pairwise(self, deltas_SCHW: Tensor) -> Tensor:
        """Similarity of every pair of seeds, symmetric (S, S), 0 on the diagonal."""
        count = len(deltas_SCHW)
        first, second = torch.triu_indices(count, count, offset=1).unbind()
        values = similarity(deltas_SCHW[first], deltas_SCHW[second], self.window)
        matrix = torch.zeros(count, count, dtype=values.dtype)
        matrix[first, second] = values.cpu()
        return matrix + matrix.T

    def score(self, text_TD: Tensor) -> float:
        """Mean similarity over all pairs of seeds: high for a memorised prompt."""
        matrix = self.pairwise(self.deltas(text_TD))
        count = len(matrix)
        return float(matrix.sum() / (count * (count - 1)))

    def left(self, text_TD: Tensor, before_SCHW: Tensor, off: UnitSet, rows: Tensor) -> float:
        """What is left of the memorisation with units switched off: the highest similarity, over the seeds `rows`,
        between the delta without and with them (section 3.3)."""
        return float(similarity(before_SCHW, self.deltas(text_TD, off, rows), self.window).max())


@dataclass(frozen=True)
class Threshold:
    """NeMo's threshold of one model: mean plus one standard deviation of the pairwise similarities of ordinary prompts
    (.428 for Stable Diffusion 1.4)."""

    value: float
    mean: float
    spread: float
    prompts: int

    @classmethod
    def of(cls, similarities: Sequence[Tensor]) -> Threshold:
        """From the similarity matrices (S, S) of ordinary prompts, in order. Raises ValueError for none."""
        if not similarities:
            raise ValueError("a threshold needs ordinary prompts")
        upper = torch.triu_indices(len(similarities[0]), len(similarities[0]), offset=1)
        values = torch.cat([matrix[upper[0], upper[1]] for matrix in similarities])
        mean, spread = float(values.double().mean()), float(values.double().std(correction=0))
        return cls(mean + spread, mean, spread, len(similarities))
