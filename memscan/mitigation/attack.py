"""This module runs the embedding attack (Kowalczuk et al. 2025, "Finding DoRI").

The attack searches for a text embedding that brings a training image back.

It finds y that minimises E ‖target - f_θ(x_t, t, y)‖² with x_t from the image; eps and t are drawn again at each step.
The optimiser is Adam with learning rate .1 and batch 8, for 50 steps. The search starts from the prompt's embedding,
from N(0, I), or from an unrelated prompt. A repair holds only if no such y brings the image back. This is tested with
seeds and starting points that no part of the repair has used. Images that were never memorised are attacked with the
same number of steps as a control, because enough steps fit anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memscan.models.denoiser import Denoiser

Start = Literal["prompt", "noise", "unrelated"]
STARTS: tuple[Start, ...] = ("prompt", "noise", "unrelated")


@dataclass(frozen=True)
class AttackSettings:
    """These are the settings of the search, with the published values."""

    steps: int = 50
    batch: int = 8
    rate: float = 0.1


def start_embedding(start: Start, prompt_TD: Tensor, unrelated_TD: Tensor, seed: int) -> Tensor:
    """Return where the search begins, (T, D)."""
    if start == "noise":
        noise = torch.randn(prompt_TD.shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(prompt_TD)
    return (prompt_TD if start == "prompt" else unrelated_TD).clone()


def attack(
    denoiser: Denoiser,
    image_CHW: Tensor,
    start_TD: Tensor,
    seed: int,
    settings: AttackSettings = AttackSettings(),
) -> Tensor:
    """Search for one embedding; see `attack_many`."""
    return attack_many(denoiser, image_CHW[None], start_TD[None], [seed], settings)[0]


def attack_many(
    denoiser: Denoiser,
    images_NCHW: Tensor,
    starts_NTD: Tensor,
    seeds: Sequence[int],
    settings: AttackSettings = AttackSettings(),
) -> Tensor:
    """Search for one embedding per image, all in one batch; each result equals that of a search alone.

    Args:
        denoiser: of the model under attack; its weights get no gradient.
        images_NCHW: latents of the images that are to come back.
        starts_NTD: where each search begins.
        seeds: of each search's noise and timesteps.

    Returns:
        The embeddings (N, T, D), float32.
    """
    device = denoiser.device
    found = starts_NTD.detach().clone().float().to(device).requires_grad_(True)
    clean = images_NCHW.to(device).repeat_interleave(settings.batch, dim=0)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    optimiser = torch.optim.Adam([found], lr=settings.rate)
    shape = (settings.batch, *images_NCHW.shape[1:])
    with torch.enable_grad():
        for _ in range(settings.steps):
            noise = torch.cat([torch.randn(shape, generator=draw) for draw in draws]).to(device)
            times = [torch.randint(0, denoiser.timesteps, (settings.batch,), generator=draw) for draw in draws]
            text = found.repeat_interleave(settings.batch, dim=0)
            losses = denoiser.losses(clean, noise, torch.cat(times).to(device), text)
            # A sum over searches of a mean over the batch: no search's gradient depends on its neighbours.
            loss = losses.view(len(seeds), settings.batch).mean(dim=1).sum()
            (found.grad,) = torch.autograd.grad(loss, [found])
            optimiser.step()
    return found.detach()
