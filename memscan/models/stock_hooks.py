"""This module watches a stock pipeline from outside.

It shows the calls of its denoiser to hooks, and changes nothing.

A guided pipeline asks for both predictions in one call of twice the rows. Those that ask in two calls, or have guidance
built in, show no prediction without caption, and the hooks that need one give no signal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memscan.models.hooks import Maps, PredictionHook, Signals, collect
from memscan.models.sampling import alpha_bars, to_epsilon


@dataclass
class Seen:
    """This is what a batch showed: signals and maps of the hooks, and whether every prediction of a row was finite."""

    signals: Signals
    finite_B: npt.NDArray[np.bool_]
    maps_Bhw: Maps | None = None


class StockHooks:
    """This shows denoiser calls to hooks.

    Args:
        denoiser: the network; None if there is none that is known, and then nothing is seen.
        pipeline: its scheduler says what the network predicts.
        velocity: the network predicts a velocity (flow matching), which hooks are then given in place of eps.
    """

    def __init__(self, denoiser: Any, pipeline: Any, hooks: Sequence[PredictionHook], *, velocity: bool) -> None:
        self._denoiser, self._pipeline, self._hooks = denoiser, pipeline, tuple(hooks)
        self._velocity = velocity
        self._count = self._calls = 0
        self.rows = 0  # that went through the denoiser, as in `calls.py`
        self._finite: list[torch.Tensor] = []

    @contextmanager
    def batch(self, count: int) -> Iterator[Seen]:
        """Watch the generation of `count` images; the result is filled at the end of the block."""
        seen = Seen({}, np.ones(count, np.bool_))
        self._count, self._calls, self._finite = count, 0, []
        for hook in self._hooks:
            hook.begin(count)
        handle = None
        if isinstance(self._denoiser, torch.nn.Module):
            handle = self._denoiser.register_forward_hook(self._on_call, with_kwargs=True)
        try:
            yield seen
        finally:
            if handle is not None:
                handle.remove()
        if self._finite:
            seen.finite_B = torch.stack(self._finite).all(dim=0).cpu().numpy()
        seen.signals, seen.maps_Bhw = collect(self._hooks)

    def _on_call(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        found = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
        if not isinstance(sample, torch.Tensor) or not isinstance(found, torch.Tensor):
            return
        self.rows += len(sample)
        copies, rest = divmod(len(found), self._count)
        if rest or len(sample) != len(found):
            return
        found = found.float()
        self._finite.append(torch.isfinite(found).reshape(copies, self._count, -1).all(dim=2).all(dim=0))
        if copies > 2:  # guidance of another kind: which rows are which is not known
            return
        if found.ndim == 4 and found.shape[1] == 2 * sample.shape[1]:
            found = found[:, : sample.shape[1]]  # the rest are variances
        timestep = _timestep(args, kwargs)
        x_t, predicted = sample.float(), self._as_noise(found, sample.float(), timestep)
        if predicted is None:
            return
        # Which half has the caption does not matter to what is a norm or a square of their difference.
        half = (x_t[: self._count], predicted[-self._count :], predicted[: self._count] if copies == 2 else None)
        for hook in self._hooks:
            hook.on_step(self._calls, timestep, *half)
        self._calls += 1

    def _as_noise(self, found: torch.Tensor, x_t: torch.Tensor, timestep: float) -> torch.Tensor | None:
        """Return the prediction as eps, or as it is for a velocity; None if it is another thing."""
        scheduler = self._pipeline.scheduler
        kind = scheduler.config.get("prediction_type", "epsilon")
        if self._velocity or kind == "epsilon":
            return found
        if kind != "v_prediction" or not hasattr(scheduler, "alphas_cumprod") or not math.isfinite(timestep):
            return None
        return to_epsilon(found, x_t, alpha_bars(scheduler, torch.tensor([timestep]))[0], kind)


def _timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the timestep of a call, the same for all rows; NaN if it is not told in the usual way."""
    value = args[1] if len(args) > 1 else kwargs.get("timestep")
    if isinstance(value, torch.Tensor):
        return float(value.reshape(-1)[0])
    return float(value) if isinstance(value, int | float) else math.nan
