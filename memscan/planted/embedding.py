"""This module trains the planted world's copy-detection embedder like SSCD (Pizzi et al. 2022); it exports TorchScript.

Two views of one content attract, all others repel (InfoNCE), and the KoLeo term spreads the embeddings over the
sphere. A content is a whole scene, an object alone on black, or a background on white with any object cut out: the
three things that a scan looks up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from memscan.planted.layers import Layers, compose, like_generated, normalised, train

SIZE = 64
DIMENSION = 128


class SmallEncoder(nn.Module):
    """This network turns images_B3HW (ImageNet-normalised) into emb_BD with unit rows.

    It keeps a 4x4 grid, because a copy has its parts in place.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128), dimension: int = DIMENSION) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width in widths:
            layers += [nn.Conv2d(inside, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inside = width
        self.features = nn.Sequential(*layers)
        self.reduce = nn.Conv2d(inside, 24, 1)
        self.project = nn.Linear(24 * 16, dimension)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        grid = self.reduce(self.features(images_B3HW))
        return functional.normalize(self.project(grid.flatten(1)), dim=1)


def train_embedder(
    model: SmallEncoder, layers: Layers, vae: AutoencoderKL, *, steps: int, batch: int = 66, rate: float = 2e-3
) -> Iterator[tuple[int, float]]:
    """Train the embedder.

    Yields (step, share of views whose nearest neighbour in the batch is their partner) every 50 steps.
    """

    def one() -> tuple[torch.Tensor, float]:
        first, second = _views(layers, vae, batch)
        emb = model(normalised(torch.cat([first, second])))
        logits = emb[:batch] @ emb[batch:].T / 0.07
        target = torch.arange(batch)
        contrast = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        return contrast + 0.1 * _koleo(emb[:batch]), float((logits.argmax(1) == target).float().mean())

    return train(model, steps, rate, one)


def _koleo(emb_BD: torch.Tensor) -> torch.Tensor:
    """Minus the mean log distance to the nearest neighbour."""
    similarity = emb_BD @ emb_BD.T - 2 * torch.eye(len(emb_BD))
    nearest = similarity.max(1).values
    return -(2 - 2 * nearest).clamp(min=1e-6).sqrt().log().mean()


def _views(layers: Layers, vae: AutoencoderKL, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views each of whole scenes, of objects cut from two backgrounds, of backgrounds with two objects cut out."""
    third = batch // 3

    def chosen() -> torch.Tensor:
        return torch.randint(0, len(layers), (third,))

    things, behind = chosen(), chosen()
    kept_thing, kept_behind = chosen(), chosen()
    views = []
    for _ in range(2):
        whole, _ = compose(layers, things, behind)
        front, front_mask = compose(layers, kept_thing, chosen())
        back, back_mask = compose(layers, chosen(), kept_behind)
        seen = like_generated(_jiggled(torch.cat([whole, front, back])), vae, strength=0.35, share=0.15)
        keep = torch.cat([torch.ones_like(front_mask), front_mask, 1 - back_mask])
        fill = torch.cat([torch.zeros(2 * third, 1, 1, 1), torch.ones(third, 1, 1, 1)])
        views.append(keep * seen + (1 - keep) * fill)
    return views[0], views[1]


def _jiggled(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the batch moved by up to two pixels."""
    shift = torch.randint(-2, 3, (2,)).tolist()
    padded = functional.pad(images_BCHW, (2, 2, 2, 2), mode="replicate")
    size = images_BCHW.shape[-1]
    return padded[:, :, 2 + shift[0] : 2 + shift[0] + size, 2 + shift[1] : 2 + shift[1] + size]


def export_embedder(model: SmallEncoder, path: Path) -> None:
    """Write TorchScript, as SSCD ships: normalised images_B3HW go in, and unit rows emb_BD come out."""
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad():
        torch.jit.trace(model, torch.zeros(2, 3, SIZE, SIZE)).save(str(path))  # type: ignore[no-untyped-call]
