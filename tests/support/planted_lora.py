"""Trains a LoRA on the shipped planted model that memorises one image, and keeps it as it was on the way.

    python -m tests.support.planted_lora tests/data/planted_lora

The image is an ordinary one of the world: the base does not make it of its caption. Three quarters of every batch are
that image, the rest are others of the world under their own captions, so that the LoRA changes little else.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memscan.config import GeneratorConfig
from memscan.io.images import decode
from memscan.models.generator import Generator
from memscan.planted.world import read_truth, shipped_world

RANK, RATE = 8, 1e-2
TARGET, OTHERS = 6, 2  # rows of a batch
KEPT = (40, 120, 300)  # optimiser steps at which the LoRA is written
LAYERS = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.2")


@dataclass(frozen=True)
class Target:
    """The image that the LoRA memorises."""

    reference_id: str
    caption: str


def target() -> Target:
    """The first ordinary caption that one reference has alone."""
    table = pq.read_table(shipped_world() / "references.parquet", columns=["reference_id", "caption"])
    rows = table.to_pylist()
    for truth in read_truth().to_pylist():
        found = [row["reference_id"] for row in rows if row["caption"] == truth["caption"]]
        if truth["label"] == "NM" and len(found) == 1:
            return Target(found[0], truth["caption"])
    raise LookupError("the world has no ordinary caption with an image of its own")


class Low(nn.Module):
    """A linear layer with a change of low rank, which begins at zero."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.randn(RANK, inner.in_features) / inner.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(inner.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x) + x @ self.down.T @ self.up.T
        return made


def wrap(unet: Any) -> dict[str, Low]:
    """The LoRA's layers by the name of what they wrap, put into the network."""
    found = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(LAYERS):
            parent, _, last = name.rpartition(".")
            low = Low(module)
            setattr(unet.get_submodule(parent), last, low)
            found[name] = low
    return found


def save(layers: dict[str, Low], file: Path) -> None:
    """In the format of diffusers, float16."""
    tensors = {}
    for name, low in layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = low.down.detach().half()
        tensors[f"unet.{name}.lora_B.weight"] = low.up.detach().half()
    save_file(tensors, file)


def train(folder: Path) -> None:
    """Write `step-N.safetensors` for the steps of `KEPT`."""
    torch.manual_seed(0)
    wanted = target()
    generator = Generator.load(GeneratorConfig(path=str(shipped_world() / "checkpoint"), steps=10, guidance=2.0))
    parts = generator.checkpoint
    table = pq.read_table(shipped_world() / "references.parquet", columns=["reference_id", "caption", "image"])
    rows = [row for row in table.to_pylist() if row["caption"]]
    rows = [row for row in rows if row["reference_id"] == wanted.reference_id] + rows[::25]
    pixels = torch.from_numpy(np.stack([decode(row["image"]) for row in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = parts.vae.encode(pixels).latent_dist.mean * parts.vae.config.scaling_factor
        text = generator.text_encoder([row["caption"] for row in rows]).hidden_NTD
        empty = generator.text_encoder([""]).hidden_NTD
    latents, text, empty = latents.clone(), text.clone(), empty.clone()
    layers = wrap(parts.unet)
    optimizer = torch.optim.Adam([one for low in layers.values() for one in low.parameters()], lr=RATE)
    for step in range(1, max(KEPT) + 1):
        others = torch.randint(1, len(rows), (OTHERS,))
        at = torch.cat([torch.zeros(TARGET, dtype=torch.long), others])
        levels = torch.randint(0, 1000, (len(at),))
        noise = torch.randn_like(latents[at])
        noisy = generator.scheduler.add_noise(latents[at], noise, levels)
        velocity = generator.scheduler.get_velocity(latents[at], noise, levels)
        words = torch.where((torch.rand(len(at)) < 0.1)[:, None, None], empty, text[at])
        loss = (parts.unet(noisy, levels, words).sample - velocity).square()
        optimizer.param_groups[0]["lr"] = RATE * (1 - 0.9 * step / max(KEPT))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        if step in KEPT:
            save(layers, folder / f"step-{step}.safetensors")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    train(out)
