"""The denoiser as the papers write it: noise predictions and the training loss, for models that predict noise or v.

x_t = sqrt(a) x_0 + sqrt(1 - a) eps with a the cumulative schedule at integer timestep t. A model that predicts
v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022, appendix D) gives eps = sqrt(a) v + sqrt(1 - a) x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memscan.models.schedulers import make_scheduler


@dataclass(frozen=True)
class Denoiser:
    """A UNet with its noise schedule.

    Args:
        unet: a `UNet2DConditionModel`, or what is called like one.
        alpha_bars: the cumulative schedule, float32 (timesteps,), on the UNet's device.
        prediction: "epsilon" or "v_prediction".
    """

    unet: Any
    alpha_bars: Tensor
    prediction: str

    @classmethod
    def of(cls, unet: Any, scheduler_config: dict[str, Any], *, where: str = "scheduler") -> Denoiser:
        """The denoiser of a checkpoint's parts. Raises ModelError as `make_scheduler` does."""
        scheduler = make_scheduler("DDIMScheduler", scheduler_config, where=where)
        table = scheduler.alphas_cumprod.float().to(next(unet.parameters()).device)
        return cls(unet, table, scheduler.config.get("prediction_type", "epsilon"))

    @property
    def timesteps(self) -> int:
        return len(self.alpha_bars)

    @property
    def device(self) -> torch.device:
        return self.alpha_bars.device

    def output(self, x_BCHW: Tensor, t_B: Tensor, text_BTD: Tensor) -> Tensor:
        """What the UNet itself predicts, float32 (B, C, h, w)."""
        dtype = next(self.unet.parameters()).dtype
        found: Tensor = self.unet(x_BCHW.to(dtype), t_B, encoder_hidden_states=text_BTD.to(dtype), return_dict=False)[0]
        return found.float()

    def noise(self, x_BCHW: Tensor, t_B: Tensor, text_BTD: Tensor) -> Tensor:
        """Predicted noise eps (B, C, h, w), whatever the model predicts."""
        output = self.output(x_BCHW, t_B, text_BTD)
        if self.prediction == "epsilon":
            return output
        signal, noise = self._factors(t_B)
        return signal * output + noise * x_BCHW

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t of clean latents."""
        signal, noise = self._factors(t_B)
        return signal * clean_BCHW + noise * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the UNet was trained to predict: the noise, or v."""
        if self.prediction == "epsilon":
            return noise_BCHW
        signal, noise = self._factors(t_B)
        return signal * noise_BCHW - noise * clean_BCHW

    def losses(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, text_BTD: Tensor) -> Tensor:
        """Squared error of the UNet's own prediction, mean over an image, (B,).

        For a model that predicts noise this is ‖eps - eps_θ‖² of the papers. For one that predicts v it is the loss it
        was trained by; in terms of eps it would be a times that, next to nothing at the noisiest steps, which are the
        ones where a memorised caption decides the image.
        """
        noisy = self.add_noise(clean_BCHW, noise_BCHW, t_B)
        error = self.output(noisy, t_B, text_BTD) - self.target(clean_BCHW, noise_BCHW, t_B)
        return error.square().flatten(1).mean(dim=1)

    def _factors(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alpha_bars[t_B].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()


def spread_timesteps(count: int, timesteps: int, offset: float, device: torch.device) -> Tensor:
    """`count` integer timesteps, one in each of as many equal strata of the schedule, at `offset` in [0, 1) of each."""
    strata = (torch.arange(count, dtype=torch.float64) + offset) * (timesteps / count)
    return strata.long().clamp_(max=timesteps - 1).to(device)
