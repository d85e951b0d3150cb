"""This module computes signals while sampling, from predictions that the sampling makes anyway.

A hook sees every denoiser call in the notation of the literature: x_t = sqrt(a) x_0 + sqrt(1 - a) eps with a the
cumulative schedule, and predictions as eps, also where the model predicts v. Hooks keep tensors on the device and read
them once per batch, so that they never make the loop wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

Signals = dict[str, npt.NDArray[np.float32]]
Maps = npt.NDArray[np.float32]


class PredictionHook(Protocol):
    """This collects a signal over one batch of generations."""

    def begin(self, count: int) -> None:
        """Start a batch of `count` images, and forget the one before."""

    def on_step(
        self,
        index: int,
        timestep: float,
        latents: torch.Tensor,
        noise_cond: torch.Tensor,
        noise_uncond: torch.Tensor | None,
    ) -> None:
        """Take one denoiser call.

        Args:
            index: number of the call, from 0.
            timestep: training timestep t of the call.
            latents: x_t, (B, C, h, w) float32.
            noise_cond: eps with the caption, (B, C, h, w) float32.
            noise_uncond: eps with the empty caption; None without guidance.
        """

    def result(self) -> Signals:
        """Return the batch's signals by name, each float32 (B,)."""


@runtime_checkable
class NetworkHook(Protocol):
    """A hook that looks into the network while it computes has these methods too."""

    def before_call(self, index: int, calls: int, ends_B: torch.Tensor | None) -> bool:
        """The sampling is about to make a denoiser call; one that a screen has made already is not announced.

        Args:
            index: number of the call, from 0.
            calls: how many the sampling has.
            ends_B: positions of the captions' first end tokens, int64; None for text that is not a caption.

        Returns:
            Whether the network's own modules must be called, where it would run compiled.
        """


@runtime_checkable
class MapHook(Protocol):
    """A hook that sees where in the image something is has these methods too."""

    def maps(self) -> Maps | None:
        """Return the batch's maps (B, h, w) in [0, 1], float32, rows of NaN if an image has none; None without any."""


def collect(hooks: Iterable[PredictionHook]) -> tuple[Signals, Maps | None]:
    """Return a batch's signals, and its maps where a hook has some."""
    signals: Signals = {}
    maps: Maps | None = None
    for hook in hooks:
        signals.update(hook.result())
        if isinstance(hook, MapHook):
            maps = hook.maps()
    return signals, maps


class DifferenceMapHook:
    """This maps where the caption moves the first prediction: (eps_c - eps_u)^2, summed over channels.

    Values are relative to the map's maximum.

    The squared score difference of the localisation literature (arXiv 2605.26756), at the first step, where the image
    is not yet decided and only what is memorised is known already (docs/detection.md). Of a velocity it is the same
    map, since at one timestep the two differ by a factor. Without guidance, or for latents that are no grid, none.
    """

    def __init__(self) -> None:
        self._map_Bhw: torch.Tensor | None = None

    def begin(self, count: int) -> None:
        self._map_Bhw = None

    def on_step(
        self,
        index: int,
        timestep: float,
        latents: torch.Tensor,
        noise_cond: torch.Tensor,
        noise_uncond: torch.Tensor | None,
    ) -> None:
        if index == 0 and noise_uncond is not None and noise_cond.ndim == 4:
            self._map_Bhw = (noise_cond - noise_uncond).square().sum(dim=1)

    def result(self) -> Signals:
        return {}

    def maps(self) -> Maps | None:
        if self._map_Bhw is None:
            return None
        relative_Bhw = self._map_Bhw / self._map_Bhw.amax(dim=(1, 2), keepdim=True)  # NaN if nothing differs
        finite_B11 = relative_Bhw.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True)
        return torch.where(finite_B11, relative_Bhw, torch.nan).float().cpu().numpy()


class NoiseNormHook:
    """This computes ||eps_c - eps_u||_2 (Wen et al. 2024).

    `noise_norm` is its mean over the denoiser calls, and `noise_norm_first` is its first value.

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
