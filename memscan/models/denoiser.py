"""The denoiser as a function eps(x_t, t, text), in the notation of the literature whatever the model predicts.

x_t = sqrt(a) x_0 + sqrt(1 - a) eps with a the cumulative schedule. A model that predicts v is converted, so that a
score built on eps is right for both: the score of the noised density is s = -eps / sqrt(1 - a).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memscan.models.sampling import alpha_bars, initial_latents, to_epsilon
from memscan.models.text import Text, size_ids


@dataclass(frozen=True)
class Level:
    """A noise level: training timestep `timestep` and the cumulative schedule `alpha_bar` there, in (0, 1)."""

    timestep: float
    alpha_bar: float

    @property
    def sigma(self) -> float:
        """sqrt(1 - alpha_bar): standard deviation of the noise in x_t."""
        return math.sqrt(1 - self.alpha_bar)


class Denoiser:
    """Predictions of a checkpoint's denoiser.

    Args:
        unet: a `UNet2DConditionModel` or another network with its signature.
        scheduler: from `schedulers.make_scheduler`; gives the schedule and the kind of prediction.
        size: image height and width, SD XL's condition.
    """

    def __init__(self, unet: Any, scheduler: Any, size: tuple[int, int] = (0, 0)) -> None:
        self.unet, self._scheduler, self._size = unet, scheduler, size

    def level(self, timestep: float) -> Level:
        """The noise level at a training timestep, which may be fractional."""
        return Level(float(timestep), alpha_bars(self._scheduler, torch.tensor([float(timestep)]))[0])

    def epsilon(self, x_BCHW: torch.Tensor, level: Level, text: Text) -> torch.Tensor:
        """Predicted noise (B, C, h, w) float32 at one level. Differentiable where gradients are on."""
        return self.convert(self.output(x_BCHW, level, text), x_BCHW, level)

    def output(self, x_BCHW: torch.Tensor, level: Level, text: Text) -> torch.Tensor:
        """What the network itself gives, float32."""
        timestep = torch.tensor(level.timestep, device=x_BCHW.device)
        if level.timestep.is_integer():
            timestep = timestep.long()
        hidden_BTD, pooled_BP = text.hidden_NTD, text.pooled_NP
        more: dict[str, Any] = {}
        if pooled_BP is not None:
            sizes = size_ids(*self._size, pooled_BP).expand(len(text), -1)
            more = {"added_cond_kwargs": {"text_embeds": pooled_BP, "time_ids": sizes}}
        x = x_BCHW.to(hidden_BTD.dtype)
        out = self.unet(x, timestep, encoder_hidden_states=hidden_BTD, return_dict=False, **more)[0]
        return out.float()  # type: ignore[no-any-return]

    def convert(self, output: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        """The network's own output at x_t as eps."""
        return to_epsilon(output, x_t, level.alpha_bar, self._scheduler)


def first_input(scheduler: Any, steps: int, seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """What the denoiser sees at the first of `steps` steps, (S, C, h, w) float32 on the host, one row a seed."""
    noise, _ = initial_latents(seeds, shape)
    scheduler.set_timesteps(steps)
    return scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])  # type: ignore[no-any-return]
