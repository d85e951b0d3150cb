"""This module is the sampling loop, which has stock components and memscan's own order of calls.

It equals the stock `StableDiffusionPipeline` step by step. In addition, predictions with and without the caption come
from one denoiser call, hooks see both, each image has its own random generator (so that it does not depend on its
neighbours in the batch), and latents stay in float32 for any precision of the denoiser. The loop itself never waits for
the device: the scheduler uses timesteps on the host, and the denoiser uses their copy on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memscan.models.hooks import NetworkHook, PredictionHook
from memscan.models.schedulers import step_accepts
from memscan.models.unet import call_options

ETA = 0.0


@dataclass(frozen=True)
class Condition:
    """These are text embeddings of one batch.

    Args:
        text_BTD: of the captions, in the denoiser's precision.
        empty_1TD: of the empty caption; None switches guidance off.
        guidance: scale of classifier-free guidance.
        pooled_BP, empty_pooled_1P: SD XL's embeddings of whole captions.
        sizes_16: SD XL's condition on sizes, `text.size_ids`.
        guided: steps that have guidance, from the first; None for all. Later ones have no prediction without caption.
        ends_B: positions of the captions' first end tokens, int64; None for text that is not a caption.
    """

    text_BTD: torch.Tensor
    empty_1TD: torch.Tensor | None
    guidance: float
    pooled_BP: torch.Tensor | None = None
    empty_pooled_1P: torch.Tensor | None = None
    sizes_16: torch.Tensor | None = None
    guided: int | None = None
    ends_B: torch.Tensor | None = None

    def inputs(self, guided: bool) -> dict[str, Any]:
        """Return the denoiser's conditions: with guidance empty captions and then captions, otherwise captions only."""
        text = _with_empty(self.empty_1TD if guided else None, self.text_BTD)
        if self.pooled_BP is None or self.sizes_16 is None:
            return {"encoder_hidden_states": text}
        pooled = _with_empty(self.empty_pooled_1P if guided else None, self.pooled_BP)
        added = {"text_embeds": pooled, "time_ids": self.sizes_16.expand(len(pooled), -1)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Return unit Gaussian latents (B, C, h, w) float32 on the host, and the generators.

    There is one generator per seed, with which the sampling continues.

    They are drawn on the host in float32, so they are the same on every device and in every precision.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


@torch.inference_mode()
def sample(
    unet: Any,
    scheduler: Any,
    condition: Condition,
    noise_BCHW: torch.Tensor,
    generators: Sequence[torch.Generator],
    steps: int,
    hooks: Sequence[PredictionHook] = (),
    first: torch.Tensor | None = None,
    count: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Denoise unit Gaussian latents under text conditions.

    Args:
        unet: a `UNet2DConditionModel`.
        scheduler: from `schedulers.make_scheduler`; its state is reset.
        noise_BCHW: float32, on any device.
        generators: one per image, for schedulers that add noise.
        steps: denoising steps.
        hooks: told of every denoiser call.
        first: the denoiser's output at the first step where a screen has it already, without caption and then with it
            (2B, C, h, w), or (B, C, h, w) without guidance, float32; that call is then not made again.
        count: told the rows of every denoiser batch.

    Returns:
        latents (B, C, h, w), float32, on the denoiser's device.
    """
    device, dtype = condition.text_BTD.device, condition.text_BTD.dtype
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    device_timesteps = timesteps.to(device)
    levels = alpha_bars(scheduler, timesteps)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    extra = _step_arguments(scheduler, generators)
    until = 0 if condition.empty_1TD is None else (steps if condition.guided is None else condition.guided)
    # Some schedulers call the denoiser more than once per step.
    until = math.ceil(until * len(timesteps) / steps)
    inputs = condition.inputs(until > 0)
    latents: torch.Tensor = noise_BCHW.to(device) * scheduler.init_noise_sigma
    for hook in hooks:
        hook.begin(len(latents))
    network_hooks = [hook for hook in hooks if isinstance(hook, NetworkHook)]
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        if until and index == until:
            inputs = condition.inputs(False)
        if index == 0 and first is not None:
            output = first.to(device)
        else:
            rows = torch.cat([scaled, scaled]) if index < until else scaled
            seen = [hook.before_call(index, len(timesteps), condition.ends_B) for hook in network_hooks]
            more = inputs | call_options(unet, len(rows) // len(scaled), index, plain=any(seen))
            if count is not None:
                count(len(rows))
            output = unet(rows.to(dtype), device_timesteps[index], **more, return_dict=False)[0].float()
        guided, cond, uncond = _guide(output, condition.guidance if index < until else None)
        if hooks:
            noise_cond = to_epsilon(cond, scaled, levels[index], prediction)
            noise_uncond = None if uncond is None else to_epsilon(uncond, scaled, levels[index], prediction)
            for hook in hooks:
                hook.on_step(index, float(timestep), scaled, noise_cond, noise_uncond)
        latents = scheduler.step(guided, timestep, latents, **extra, return_dict=False)[0]
    return latents


def _guide(output: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if scale is None:
        return output, output, None
    uncond, cond = output.chunk(2)
    return uncond + scale * (cond - uncond), cond, uncond


def _with_empty(empty_1: torch.Tensor | None, rows_B: torch.Tensor) -> torch.Tensor:
    return rows_B if empty_1 is None else torch.cat([empty_1.expand_as(rows_B), rows_B])


def _step_arguments(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if step_accepts(scheduler, "eta"):
        extra["eta"] = ETA
    if step_accepts(scheduler, "generator"):
        extra["generator"] = list(generators)
    return extra


def alpha_bars(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """Return the cumulative schedule at the timesteps; schedulers in sigma notation use fractional ones."""
    return schedule_at(scheduler.alphas_cumprod, timesteps)


def schedule_at(table: torch.Tensor, timesteps: torch.Tensor) -> list[float]:
    """Return a cumulative schedule at timesteps, linear between two of them."""
    values = table.double().cpu().numpy()
    return [float(value) for value in np.interp(timesteps.double().numpy(), np.arange(len(values)), values)]


def to_epsilon(
    output: torch.Tensor, x_t: torch.Tensor, alpha_bar: float | torch.Tensor, prediction: str
) -> torch.Tensor:
    """Return the output as eps.

    If the model predicts v, it is sqrt(a) v + sqrt(1 - a) x_t (Salimans and Ho 2022, appendix D).

    Args:
        alpha_bar: the cumulative schedule at the output's timestep, or (B, 1, 1, 1) of each row's.
        prediction: "epsilon" or "v_prediction".
    """
    if prediction == "epsilon":
        return output
    return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x_t
