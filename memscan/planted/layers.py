"""This module makes training material for segmenter and embedder.

It combines object and background layers freely, and imitates what generators do to images.

2,000 objects and 2,000 backgrounds give four million scenes without drawing one of them; generated images are
imitated by passing scenes through the autoencoder with noisy latents, and by blur, noise and brightness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from memscan.planted.renderer import Scene, random_background, random_object, render_layers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Layers:
    """These are bodies_NCHW, masks_N1HW and backgrounds_NCHW, all float32 in [0, 1]."""

    bodies_NCHW: torch.Tensor
    masks_N1HW: torch.Tensor
    backgrounds_NCHW: torch.Tensor

    def __len__(self) -> int:
        return len(self.bodies_NCHW)


def draw_layers(seed: int, count: int = 2000) -> Layers:
    """Draw layers over the renderer's whole range."""
    rng = np.random.default_rng([seed, 3])
    parts = [render_layers(Scene(random_object(rng), random_background(rng))) for _ in range(count)]

    def stacked(position: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([part[position] for part in parts]))

    return Layers(stacked(0).permute(0, 3, 1, 2), stacked(1)[:, None], stacked(2).permute(0, 3, 1, 2))


def compose(layers: Layers, objects: torch.Tensor, backgrounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images_BCHW in [0, 1] and masks_B1HW of the chosen objects in front of the chosen backgrounds."""
    masks = layers.masks_N1HW[objects]
    return masks * layers.bodies_NCHW[objects] + (1 - masks) * layers.backgrounds_NCHW[backgrounds], masks


def like_generated(
    images_BCHW: torch.Tensor, vae: AutoencoderKL, *, strength: float = 0.5, share: float = 0.5
) -> torch.Tensor:
    """Make images look generated: a random share passes through the autoencoder with noisy latents.

    All get brightness, blur and noise, and lie in [0, 1].
    """
    images = images_BCHW.clone()
    count = len(images)
    passed = torch.randperm(count)[: max(1, int(count * share))]
    with torch.no_grad():
        latents = vae.encode(images[passed] * 2 - 1).latent_dist.mean
        latents = latents + torch.randn_like(latents) * torch.rand(len(passed), 1, 1, 1) * strength
        images[passed] = vae.decode(latents).sample / 2 + 0.5
    images = images * (1 + 0.15 * (torch.rand(count, 1, 1, 1) * 2 - 1)) + 0.08 * (torch.rand(count, 3, 1, 1) * 2 - 1)
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, torch.rand(count, 1, 1, 1))
    images = images + torch.randn_like(images) * torch.rand(count, 1, 1, 1) * 0.05
    return images.clamp(0, 1)


def normalised(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Normalise by ImageNet's mean and standard deviation, as BiRefNet and SSCD take their input."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (images_BCHW - mean[:, None, None]) / std[:, None, None]


def train(
    model: torch.nn.Module, steps: int, rate: float, batch: Callable[[], tuple[torch.Tensor, float]]
) -> Iterator[tuple[int, float]]:
    """Train a model by AdamW under a one-cycle learning rate.

    Args:
        rate: the highest learning rate.
        batch: gives the loss of a fresh batch, and a figure that tells how well it went.

    Yields:
        (step, mean figure of the last 50 batches) every 50 steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    running = 0.0
    for step in range(1, steps + 1):
        loss, figure = batch()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        running += figure
        if step % 50 == 0:
            yield step, running / 50
            running = 0.0
