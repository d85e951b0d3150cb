"""Signals taken while sampling, from predictions that the sampling makes anyway.

A tap sees every denoiser call in the notation of the literature: x_t = sqrt(a) x_0 + sqrt(1 - a) eps with a the
cumulative schedule, and predictions as eps, also where the model predicts v. Taps keep tensors on the device and read
them once a batch, so that they never make the loop wait.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Signals = dict[str, npt.NDArray[np.float32]]


class Tap(Protocol):
    """Collects a signal over one batch of generations."""

    def begin(self, count: int) -> None:
        """A batch of `count` images starts; forget the one before."""

    def on_step(
        self,
        index: int,
        timestep: float,
        latents: torch.Tensor,
        noise_cond: torch.Tensor,
        noise_uncond: torch.Tensor | None,
    ) -> None:
        """One denoiser call.

        Args:
            index: number of the call, from 0.
            timestep: training timestep t of the call.
            latents: x_t, (B, C, h, w) float32.
            noise_cond: eps with the caption, (B, C, h, w) float32.
            noise_uncond: eps with the empty caption; None without guidance.
        """

    def result(self) -> Signals:
        """The batch's signals by name, each float32 (B,)."""


class NoiseNormTap:
    """||eps_c - eps_u||_2 (Wen et al. 2024): `noise_norm`, its mean over the denoiser calls, and `noise_norm_first`.

    The norm runs over all latent channels and positions of an image. Without guidance there is no signal.

    Args:
        name: of the signal; another one where what is predicted is not eps.
    """

    def __init__(self, name: str = "noise_norm") -> None:
        self._name = name
        self._norms: list[torch.Tensor] = []

    def begin(self, count: int) -> None:
        self._norms = []

    def on_step(
        self,
        index: int,
        timestep: float,
        latents: torch.Tensor,
        noise_cond: torch.Tensor,
        noise_uncond: torch.Tensor | None,
    ) -> None:
        if noise_uncond is not None:
            self._norms.append(torch.linalg.vector_norm((noise_cond - noise_uncond).flatten(1), dim=1))

    def result(self) -> Signals:
        if not self._norms:
            return {}
        norms_SB = torch.stack(self._norms).float().cpu()
        return {self._name: norms_SB.mean(dim=0).numpy(), f"{self._name}_first": norms_SB[0].numpy().copy()}
