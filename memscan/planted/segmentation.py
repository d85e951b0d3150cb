"""This module makes the planted world's segmenter.

It is a small U-Net, exported in `birefnet-general`'s file format (ONNX, one logit map).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from memscan.planted.layers import Layers, compose, like_generated, normalised, train

SIZE = 64


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
    )  # fmt: skip


class SmallUNet(nn.Module):
    """This network turns images_B3HW (ImageNet-normalised) into logits_B1HW."""

    def __init__(self, widths: tuple[int, ...] = (12, 24, 48, 64)) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.stem = _block(3, widths[0])
        self.down = nn.ModuleList(_block(a, b, 2) for a, b in pairs)
        self.up = nn.ModuleList(_block(a + b, a) for a, b in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        x = self.stem(images_B3HW)
        skips = [x]
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1))
        logits: torch.Tensor = self.head(x)
        return logits


def train_segmenter(
    model: SmallUNet, layers: Layers, vae: AutoencoderKL, *, steps: int, batch: int = 32, rate: float = 3e-3
) -> Iterator[tuple[int, float]]:
    """Train with cross-entropy plus soft Dice on composed scenes.

    Yields (step, mean intersection over union) every 50 steps.
    """

    def one() -> tuple[torch.Tensor, float]:
        chosen, behind = torch.randint(0, len(layers), (batch,)), torch.randint(0, len(layers), (batch,))
        images, masks = compose(layers, chosen, behind)
        logits = model(normalised(like_generated(images, vae)))
        soft = logits.sigmoid()
        dice = 1 - (2 * (soft * masks).sum((1, 2, 3)) + 1) / ((soft + masks).sum((1, 2, 3)) + 1)
        loss = functional.binary_cross_entropy_with_logits(logits, masks) + 0.3 * dice.mean()
        hit, truth = logits > 0, masks > 0.5
        return loss, float(((hit & truth).sum((1, 2, 3)) / (hit | truth).sum((1, 2, 3))).mean())

    return train(model, steps, rate, one)


def export_segmenter(model: SmallUNet, path: Path) -> None:
    """Write ONNX: `input_image` (N, 3, 64, 64) goes in, and `output_image` (N, 1, 64, 64) has logits; N is dynamic."""
    torch.onnx.export(
        model.eval().to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
        (torch.zeros(1, 3, SIZE, SIZE),),
        str(path),
        input_names=["input_image"],
        output_names=["output_image"],
        dynamic_axes={"input_image": {0: "N"}, "output_image": {0: "N"}},
        opset_version=17,
        dynamo=False,
    )
