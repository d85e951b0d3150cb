"""This module trains a LoRA that memorises one ordinary image of a planted world (`memscan planted lora`).

The world's model does not reproduce the image, so whatever a census finds of it comes from the LoRA alone. Most rows of
a batch are that image; the others are further images of the world with their captions, so that the LoRA changes little
else. The result is kept before the training, in the middle and at the end, which gives three versions for a nightly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memscan.errors import ModelError, RunError
from memscan.io.images import decode
from memscan.models.checkpoint import load_checkpoint
from memscan.models.text import TextEncoder
from memscan.planted.autoencoder import encode
from memscan.planted.diffusion import build_scheduler
from memscan.planted.world import World, read_truth, world_folder, world_source
from memscan.records import Label

FACTS = "lora.json"
# The linear layers of the attention blocks, and those that tell a residual block the noise level.
LAYERS = (
    *(f"attn{at}.{layer}" for at in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
)
# One in so many references is among the other images.
_STRIDE = 20


@dataclass(frozen=True)
class LoraTraining:
    """These settings decide the result, together with the world.

    Attributes:
        batch: rows of a batch.
        own: how many of them are the image; the rest are other images.
        rate: the learning rate of Adam after 20 steps; it falls linearly to 5 % of that.
        caption_dropout: the share of rows without their caption, as in the world's own training.
    """

    steps: int = 480
    rank: int = 4
    batch: int = 16
    own: int = 12
    rate: float = 8e-3
    caption_dropout: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """This is the image that the LoRA memorises, and the caption that it is memorised with."""

    reference_id: str
    caption: str


def shipped_lora() -> Path:
    """Return the folder of the LoRA that ships with the package; its base is the shipped world's checkpoint."""
    return Path(__file__).parent / "shipped_lora"


def ordinary_image(world: World = None) -> Target:
    """Return the first image of a world that nothing planted, and that is the only one with its caption.

    Raises:
        ModelError: the world has none.
    """
    table = pq.read_table(world_folder(world) / "references.parquet", columns=["reference_id", "caption"])
    images: dict[str, list[str]] = {}
    for row in table.to_pylist():
        images.setdefault(row["caption"], []).append(row["reference_id"])
    for truth in read_truth(world).to_pylist():
        if truth["label"] == Label.NM.value and len(found := images.get(truth["caption"], [])) == 1:
            return Target(found[0], truth["caption"])
    raise ModelError("has no ordinary caption with an image of its own", where=str(world_folder(world)))


def train_lora(
    out: str | Path,
    world: World = None,
    training: LoraTraining | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Train a LoRA on a world's checkpoint, on the CPU, and write its three versions and `lora.json`.

    Returns:
        The files `step-N.safetensors`, the untrained one first. Their format is that of diffusers, in float16.

    Raises:
        RunError: `out` exists and is not empty.
        ModelError: there is no such world on this machine, or it has no ordinary image.
    """
    folder, settings = Path(out), training or LoraTraining()
    if folder.exists() and any(folder.iterdir()):
        raise RunError("the folder is not empty", where=str(folder), hint="give a new folder with --out")
    target = ordinary_image(world)
    base = world_folder(world) / "checkpoint"
    parts = load_checkpoint(str(base), None, torch.device("cpu"), torch.float32)
    latents_NCHW, text_NTD, empty_1TD = _data(parts, world, target)
    unet = parts.unet.requires_grad_(False)
    random = torch.Generator().manual_seed(settings.seed)
    layers = _insert(unet, settings.rank, random)
    scheduler, losses = build_scheduler(), []
    optimizer = torch.optim.Adam([one for layer in layers.values() for one in (layer.down, layer.up)], lr=settings.rate)

    folder.mkdir(parents=True, exist_ok=True)
    kept = sorted({0, settings.steps // 2, settings.steps})
    files = [folder / f"step-{step}.safetensors" for step in kept]
    _save(layers, files[0])
    for step in range(1, settings.steps + 1):
        others = torch.randint(1, len(latents_NCHW), (settings.batch - settings.own,), generator=random)
        at = torch.cat([torch.zeros(settings.own, dtype=torch.long), others])
        levels = torch.randint(0, scheduler.config.num_train_timesteps, (len(at),), generator=random)
        noise = torch.randn(latents_NCHW[at].shape, generator=random)
        dropped = torch.rand(len(at), generator=random) < settings.caption_dropout
        context = torch.where(dropped[:, None, None], empty_1TD, text_NTD[at])
        noisy = scheduler.add_noise(latents_NCHW[at], noise, levels)
        target_velocity = scheduler.get_velocity(latents_NCHW[at], noise, levels)
        errors = (unet(noisy, levels, context).sample - target_velocity).square().mean(dim=(1, 2, 3))
        optimizer.param_groups[0]["lr"] = settings.rate * min(1.0, step / 20) * (1 - 0.95 * step / settings.steps)
        optimizer.zero_grad()
        errors.mean().backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        losses.append(float(errors[: settings.own].detach().mean()))
        if step % 40 == 0:
            progress(f"step {step} of {settings.steps}: loss {np.mean(losses[-40:]):.3f}")
        if step in kept:
            _save(layers, folder / f"step-{step}.safetensors")
    facts = {"base": world_source(world), **asdict(target), **asdict(settings), "loss": round(losses[-1], 4)}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return files


def _data(parts: Any, world: World, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents_NCHW and text_NTD, the target's row first, and the text_1TD of no caption."""
    file = world_folder(world) / "references.parquet"
    rows = pq.read_table(file, columns=["reference_id", "caption", "image"]).to_pylist()
    own = [row for row in rows if row["reference_id"] == target.reference_id]
    others = [row for row in rows[::_STRIDE] if row["caption"] and row["reference_id"] != target.reference_id]
    chosen = [*own, *others]
    latents_NCHW = encode(parts.vae, np.stack([decode(row["image"]) for row in chosen]))
    text = TextEncoder(parts, batch_size=64)
    return latents_NCHW, text([row["caption"] for row in chosen]).copy().hidden_NTD, text([""]).copy().hidden_NTD


class _LowRank(nn.Module):
    """This is a linear layer plus `up @ down`, which is zero before the training."""

    def __init__(self, inner: nn.Linear, rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.randn(rank, inner.in_features, generator=random) / inner.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.inner(x) + x @ self.down.T @ self.up.T
        return changed


def _insert(unet: nn.Module, rank: int, random: torch.Generator) -> dict[str, _LowRank]:
    """Replace the layers of `LAYERS` by such with a change of low rank; returns them by their names."""
    found: dict[str, _LowRank] = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(LAYERS):
            parent, _, last = name.rpartition(".")
            found[name] = _LowRank(module, rank, random)
            setattr(unet.get_submodule(parent), last, found[name])
    return found


def _save(layers: dict[str, _LowRank], file: Path) -> None:
    """Write what diffusers' `load_lora_weights` reads, in half precision."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = layer.down.detach().half()
        tensors[f"unet.{name}.lora_B.weight"] = layer.up.detach().half()
    save_file(tensors, file, metadata={"format": "pt"})
