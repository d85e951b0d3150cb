"""This module computes NeMo's memorisation score of prompts, also with units switched off, and the model's threshold.

The score is `memscan.detection.similarity`; here are the denoiser calls that it is made of. The paper evaluates the
first timestep of the schedule; the published code evaluates the second one, still on x_T. `Convention` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memscan.detection.similarity import Window, mean_similarity, pairwise, similarity, unit_range
from memscan.mitigation.units import Layout, UnitSet, switched_off
from memscan.models.denoiser import Denoiser
from memscan.models.sampling import initial_latents
from memscan.models.schedulers import make_scheduler

Convention = Literal["first", "second"]


class NoiseScore:
    """This computes the score of prompts of one model.

    Args:
        denoiser: of the model.
        layout: units that can be switched off.
        shape: of a latent, (C, h, w).
        steps: of the schedule whose first or second timestep is used.
        seeds: one latent each; at least two.
        convention: which timestep.
        scheduler_config: the checkpoint's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layout: Layout,
        shape: tuple[int, int, int],
        scheduler_config: dict[str, Any],
        *,
        steps: int = 50,
        seeds: Sequence[int] = tuple(range(10)),
        convention: Convention = "second",
    ) -> None:
        if len(seeds) < 2:
            raise ValueError("a similarity between seeds needs two of them")
        self.denoiser, self.layout = denoiser, layout
        self.window = Window.fitting(*shape[1:])
        self.noise_SCHW = initial_latents(seeds, shape)[0].to(denoiser.device)
        scheduler = make_scheduler("DDIMScheduler", scheduler_config, where="scheduler")
        scheduler.set_timesteps(steps)
        self.timestep = int(scheduler.timesteps[0 if convention == "first" or steps == 1 else 1])

    @torch.no_grad()
    def deltas(self, text_TD: Tensor, off: UnitSet | None = None, rows: Tensor | None = None) -> Tensor:
        """Return scaled noise differences of one text, (S, C, h, w), with units switched off.

        Args:
            rows: seeds to take, by position; all of them by default.
        """
        noise = self.noise_SCHW if rows is None else self.noise_SCHW[rows]
        text = text_TD.to(self.denoiser.device).expand(len(noise), -1, -1)
        times = torch.full((len(noise),), self.timestep, device=self.denoiser.device)
        context = switched_off(self.denoiser.unet, self.layout, off) if off is not None and len(off) else nullcontext()
        with context:
            predicted = self.denoiser.noise(noise, times, text)
        return unit_range(predicted - noise)

    def pairwise(self, deltas_SCHW: Tensor) -> Tensor:
        """Return the similarity of every pair of seeds, symmetric (S, S), 0 on the diagonal."""
        return pairwise(deltas_SCHW, self.window)

    def score(self, text_TD: Tensor) -> float:
        """Return the mean similarity over all pairs of seeds: high for a memorised prompt."""
        return mean_similarity(self.pairwise(self.deltas(text_TD)))

    def left(self, text_TD: Tensor, before_SCHW: Tensor, off: UnitSet, rows: Tensor) -> float:
        """Return what remains of the memorisation with units switched off (section 3.3).

        This is the highest similarity, over the seeds `rows`, between the delta without and the delta with the units
        off.
        """
        return float(similarity(before_SCHW, self.deltas(text_TD, off, rows), self.window).max())


@dataclass(frozen=True)
class Threshold:
    """This is NeMo's threshold of one model.

    It is the mean plus one standard deviation of the pairwise similarities of ordinary prompts (.428 for Stable
    Diffusion 1.4).
    """

    value: float
    mean: float
    spread: float
    prompts: int

    @classmethod
    def of(cls, similarities: Sequence[Tensor]) -> Threshold:
        """Compute the threshold from the similarity matrices (S, S) of ordinary prompts, in order.

        Raises ValueError if there are none.
        """
        if not similarities:
            raise ValueError("a threshold needs ordinary prompts")
        upper = torch.triu_indices(len(similarities[0]), len(similarities[0]), offset=1)
        values = torch.cat([matrix[upper[0], upper[1]] for matrix in similarities])
        mean, spread = float(values.double().mean()), float(values.double().std(correction=0))
        return cls(mean + spread, mean, spread, len(similarities))
