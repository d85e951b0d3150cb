"""This module gives the denoiser as a function of (x_t, t, text) in the notation of the literature.

The notation is the same whatever the model predicts.

x_t = sqrt(a) x_0 + sqrt(1 - a) eps with a the cumulative schedule. A model that predicts v = sqrt(a) eps - sqrt(1 - a)
x_0 (Salimans and Ho 2022, appendix D) is converted, so that a score built on eps is right for both: the score of the
noised density is s = -eps / sqrt(1 - a). Calls at one noise level for all rows take a `Level`, which may lie between
two training timesteps; training and attacks take integer timesteps, one per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memscan.models.sampling import initial_latents, schedule_at, to_epsilon
from memscan.models.schedulers import make_scheduler
from memscan.models.text import Text, size_ids


@dataclass(frozen=True)
class Level:
    """This is a noise level.

    It has the training timestep `timestep` and the cumulative schedule `alpha_bar` there, in (0, 1).
    """

    timestep: float
    alpha_bar: float

    @property
    def sigma(self) -> float:
        """This is sqrt(1 - alpha_bar), the standard deviation of the noise in x_t."""
        return math.sqrt(1 - self.alpha_bar)


@dataclass(frozen=True)
class Denoiser:
    """This is a denoiser with its noise schedule.

    Args:
        unet: a `UNet2DConditionModel`, or what is called like one.
        alpha_bars: the cumulative schedule, float32 (timesteps,), on the network's device.
        prediction: "epsilon" or "v_prediction".
        size: image height and width, SD XL's condition.
    """

    unet: Any
    alpha_bars: Tensor
    prediction: str
    size: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, unet: Any, schedule: Any, *, size: tuple[int, int] = (0, 0), where: str = "scheduler") -> Denoiser:
        """Return a denoiser with a scheduler of `schedulers.make_scheduler`.

        A checkpoint's configuration of a scheduler is accepted too.

        Raises:
            ModelError: as `make_scheduler` does.
        """
        scheduler = make_scheduler("DDIMScheduler", schedule, where=where) if isinstance(schedule, dict) else schedule
        table, weights = scheduler.alphas_cumprod.float(), _weights(unet)
        kind = str(scheduler.config.get("prediction_type", "epsilon"))
        return cls(unet, table if weights is None else table.to(weights.device), kind, size)

    @property
    def timesteps(self) -> int:
        """This is the number of training timesteps."""
        return len(self.alpha_bars)

    @property
    def device(self) -> torch.device:
        """This is the device of the network."""
        return self.alpha_bars.device

    def level(self, timestep: float) -> Level:
        """Return the noise level at a training timestep, which may be fractional."""
        return Level(float(timestep), schedule_at(self.alpha_bars, torch.tensor([float(timestep)]))[0])

    def epsilon(self, x_BCHW: Tensor, level: Level, text: Text) -> Tensor:
        """Return predicted noise (B, C, h, w) float32 at one level.

        It is differentiable if gradients are on.
        """
        return self.convert(self.output(x_BCHW, level, text), x_BCHW, level)

    def output(self, x_BCHW: Tensor, level: Level, text: Text) -> Tensor:
        """Return the network's own output at one level, float32."""
        timestep = torch.tensor(level.timestep, device=x_BCHW.device)
        return self._call(x_BCHW, timestep.long() if level.timestep.is_integer() else timestep, text)

    def convert(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """Convert the network's own output at x_t to eps."""
        return to_epsilon(output, x_t, level.alpha_bar, self.prediction)

    def noise(self, x_BCHW: Tensor, t_B: Tensor, text_BTD: Tensor) -> Tensor:
        """Return predicted noise (B, C, h, w) float32 at integer timesteps, one per row."""
        output = self._call(x_BCHW, t_B, Text(text_BTD))
        if self.prediction == "epsilon":
            return output
        return to_epsilon(output, x_BCHW, self._at(t_B), self.prediction)

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return x_t of clean latents."""
        a = self._at(t_B)
        return a.sqrt() * clean_BCHW + (1 - a).sqrt() * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return what the network was trained to predict: the noise, or v."""
        if self.prediction == "epsilon":
            return noise_BCHW
        a = self._at(t_B)
        return a.sqrt() * noise_BCHW - (1 - a).sqrt() * clean_BCHW

    def losses(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, text_BTD: Tensor) -> Tensor:
        """Return the squared error of the network's own prediction, as the mean over an image, (B,).

        For a model that predicts noise this is ‖eps - eps_θ‖² of the papers. For one that predicts v it is the loss it
        was trained by; in terms of eps it would be a times that, next to nothing at the noisiest steps, which are the
        ones where a memorised caption decides the image.
        """
        predicted = self._call(self.add_noise(clean_BCHW, noise_BCHW, t_B), t_B, Text(text_BTD))
        return (predicted - self.target(clean_BCHW, noise_BCHW, t_B)).square().flatten(1).mean(dim=1)

    def _call(self, x_BCHW: Tensor, timestep: Tensor, text: Text) -> Tensor:
        weights = _weights(self.unet)
        dtype = text.hidden_NTD.dtype if weights is None else weights.dtype
        more: dict[str, Any] = {}
        if text.pooled_NP is not None:
            sizes = size_ids(*self.size, text.pooled_NP).expand(len(text), -1)
            more = {"added_cond_kwargs": {"text_embeds": text.pooled_NP, "time_ids": sizes}}
        hidden = text.hidden_NTD.to(dtype)
        out = self.unet(x_BCHW.to(dtype), timestep, encoder_hidden_states=hidden, return_dict=False, **more)[0]
        return out.float()  # type: ignore[no-any-return]

    def _at(self, t_B: Tensor) -> Tensor:
        return self.alpha_bars[t_B].view(-1, 1, 1, 1)


def _weights(network: Any) -> Tensor | None:
    """Some parameter of a network, which shows its precision and device; None for a function."""
    return next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None


def first_input(scheduler: Any, steps: int, seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Return the denoiser's input at the first of `steps` steps, (S, C, h, w) float32 on the host, one row per seed."""
    noise, _ = initial_latents(seeds, shape)
    scheduler.set_timesteps(steps)
    return scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])  # type: ignore[no-any-return]


def spread_timesteps(count: int, timesteps: int, offset: float, device: torch.device) -> Tensor:
    """Return `count` integer timesteps, one in each of as many equal strata of the schedule.

    Each is at `offset` in [0, 1) of its stratum.
    """
    strata = (torch.arange(count, dtype=torch.float64) + offset) * (timesteps / count)
    return strata.long().clamp_(max=timesteps - 1).to(device)
