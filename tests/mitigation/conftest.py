"""Tiny denoisers with random weights: 8 x 8 latents, a few cross-attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memscan.models.denoiser import Denoiser

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 100}
TEXT = 16


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., Any]:
    """Fresh UNets; equal for equal seeds."""
    from diffusers import UNet2DConditionModel

    def make(seed: int = 0, gain: float = 1.5) -> Any:
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(gain)
        return unet.eval().requires_grad_(False)

    return make


@pytest.fixture
def unet(make_unet: Callable[..., Any]) -> Any:
    return make_unet()


@pytest.fixture
def denoiser(unet: Any) -> Denoiser:
    return Denoiser.of(unet, SCHEDULE)
