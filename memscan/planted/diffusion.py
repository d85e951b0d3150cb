"""This module trains a world's text encoder and UNet on the latents of its training set.

A small network must memorise what was planted, and nothing else, within an hour on two cores. For this the training has
latents that are computed once, v-prediction with equal weights (min-SNR would starve the noisiest steps, where a
memorised caption decides its image), an exponential moving average, a cosine learning rate, a planted share of about 40
% of the training rows, and mirrored copies of the ordinary images so that none of them is seen often.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainingSet:
    """This holds latents_NCHW of every image, the mirrored ones (equal if mirroring is off), and the caption rows.

    Attributes:
        image_R: index into the latents of each row; repeated rows are the copies.
        tokens_RL: token ids of each row.
        mirror_R: whether a row may be mirrored.
    """

    latents_NCHW: torch.Tensor
    mirrored_NCHW: torch.Tensor
    image_R: torch.Tensor
    tokens_RL: torch.Tensor
    mirror_R: torch.Tensor


@dataclass(frozen=True)
class Training:
    """These settings say how long and how fast to train.

    `minutes` bounds the wall clock; the learning rate follows the share that has passed.
    """

    minutes: float
    max_steps: int = 20_000
    batch: int = 64
    rate: float = 1e-3
    ema: float = 0.998
    caption_dropout: float = 0.1
    snapshot_at: float = 0.12  # share of the training after which the earlier checkpoint is taken
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Trained:
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    snapshot: UNet2DConditionModel
    steps: int
    loss: float


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a two-layer CLIP text encoder for the tokenizer's vocabulary and length."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        projection_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # CLIP's 0.02 is made for 400 M pairs: at this scale words stayed indistinct for the first thousand steps.
            nn.init.normal_(module.weight, std=0.3)
    return model


def build_unet(channels: int, size: int, text_width: int) -> UNet2DConditionModel:
    """Return a small UNet with cross-attention in both down blocks, the middle and the lower up block."""
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def train_diffusion(
    data: TrainingSet,
    tokenizer: CLIPTokenizer,
    training: Training,
    progress: Progress,
    start: tuple[CLIPTextModel, UNet2DConditionModel] | None = None,
) -> Trained:
    """Train until the minutes or the steps are used up; returns the averaged weights and the early snapshot.

    `start` gives the initial weights; without it they are random.
    """
    device = _device(training.device)
    data = TrainingSet(*(getattr(data, field.name).to(device) for field in fields(data)))
    torch.manual_seed(training.seed)
    text_encoder = build_text_encoder(tokenizer)
    unet = build_unet(data.latents_NCHW.shape[1], data.latents_NCHW.shape[2], text_encoder.config.hidden_size)
    if start is not None:
        text_encoder.load_state_dict(start[0].state_dict())
        unet.load_state_dict(start[1].state_dict())
    model = nn.ModuleDict({"text": text_encoder, "unet": unet}).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    snapshot: UNet2DConditionModel | None = None
    scheduler = build_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    empty_L = torch.tensor(tokenizer("", padding="max_length").input_ids, device=device)

    began, share, running, step = time.monotonic(), 0.0, 0.0, 0
    while share < 1 and step < training.max_steps:
        step += 1
        share = max((time.monotonic() - began) / (60 * training.minutes), step / training.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * _rate(share, step)
        loss = _loss(model, scheduler, data, training, empty_L)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _average(averaged, model, min(training.ema, (step + 1) / (step + 10)))
        running = float(loss.detach()) if step == 1 else 0.99 * running + 0.01 * float(loss.detach())
        if snapshot is None and share >= training.snapshot_at:
            snapshot = copy.deepcopy(averaged["unet"])
            progress(f"snapshot at step {step}")
        if step % 100 == 0:
            progress(f"step {step}: loss {running:.4f}, {100 * min(share, 1):.0f} % of the training")
    snapshot = snapshot or copy.deepcopy(averaged["unet"])
    return Trained(averaged["text"].cpu(), averaged["unet"].cpu(), snapshot.cpu(), step, running)


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _rate(share: float, step: int) -> float:
    """Linear warm-up over 100 steps, then half a cosine down to 2 %."""
    cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * min(share, 1.0))).item()
    return min(1.0, step / 100) * (0.02 + 0.98 * cosine)


def _loss(
    model: nn.ModuleDict, scheduler: DDIMScheduler, data: TrainingSet, training: Training, empty_L: torch.Tensor
) -> torch.Tensor:
    device = data.image_R.device
    rows = torch.randint(0, len(data.image_R), (training.batch,), device=device)
    images = data.image_R[rows]
    mirrored = (torch.rand(training.batch, device=device) < 0.5) & data.mirror_R[rows]
    clean = torch.where(mirrored[:, None, None, None], data.mirrored_NCHW[images], data.latents_NCHW[images])
    tokens = data.tokens_RL[rows].clone()
    tokens[torch.rand(training.batch, device=device) < training.caption_dropout] = empty_L

    steps = torch.randint(0, scheduler.config.num_train_timesteps, (training.batch,), device=device)
    noise = torch.randn_like(clean)
    noisy = scheduler.add_noise(clean, noise, steps)
    target = scheduler.get_velocity(clean, noise, steps)
    context = model["text"](tokens).last_hidden_state
    predicted = model["unet"](noisy.contiguous(memory_format=torch.channels_last), steps, context).sample
    loss: torch.Tensor = (predicted - target).square().mean()
    return loss


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
