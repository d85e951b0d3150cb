"""This module computes the first denoiser step of many prompts with one bank of seeds, which is the cost of a screen.

With the same seeds for every prompt, the prediction without caption is the same for every prompt. It is computed once
per seed, so that a prompt costs one call per seed and not two. The network's outputs are kept unchanged. The sampling
of a prompt can therefore continue from them, and makes the same images as if it had made the calls itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memscan.detection.base import Need
from memscan.models.attention import has_cross_attention
from memscan.models.denoiser import Denoiser, Level, first_input
from memscan.models.generator import Generator
from memscan.models.text import Text
from memscan.records import sample_seed

BANK = "seed-bank"  # no prompt's id: ids are hexadecimal


def bank_seeds(count: int, base_seed: int = 0) -> list[int]:
    """Return seeds of the bank, in [0, 2**63): those of every screened prompt's first samples."""
    return [sample_seed(BANK, number, base_seed) for number in range(count)]


@dataclass(frozen=True)
class FirstStep:
    """This holds predictions of P prompts under S seeds at the first timestep, float32 on the device.

    Args:
        x_SCHW: what the denoiser saw (pure noise).
        outputs_PSCHW: the network's outputs with the caption, as they came.
        empty_SCHW: and without it; None without guidance.
        text, empty: the P captions and the empty one (N = 1), for detectors that make further calls.
        timesteps: of the sampling, from the first to the last.
    """

    x_SCHW: torch.Tensor
    outputs_PSCHW: torch.Tensor
    empty_SCHW: torch.Tensor | None
    text: Text
    empty: Text | None
    denoiser: Denoiser
    timesteps: tuple[float, ...]

    @property
    def level(self) -> Level:
        return self.denoiser.level(self.timesteps[0])

    @property
    def cond_PSCHW(self) -> torch.Tensor:
        """This is eps with the caption."""
        return self.denoiser.convert(self.outputs_PSCHW, self.x_SCHW[None], self.level)

    @property
    def uncond_SCHW(self) -> torch.Tensor:
        """This is eps without the caption. Raises ValueError without guidance."""
        if self.empty_SCHW is None:
            raise ValueError("no unconditional prediction: guidance is off")
        return self.denoiser.convert(self.empty_SCHW, self.x_SCHW, self.level)

    @property
    def difference_PSCHW(self) -> torch.Tensor:
        """This is eps_c - eps_u."""
        return self.cond_PSCHW - self.uncond_SCHW[None]


class FirstStepper:
    """This computes first steps over a bank of seeds.

    Args:
        generator: the model under its sampling rule; its scheduler's first timestep is the step.
        seeds: the bank.
        rows: latents in one denoiser batch.
        timestep: the timestep that the model is given instead of the first one. At T a prediction is the mean of
            what the caption allows; told of less noise, the model answers with a picture. A sampling cannot take that
            up.
    """

    def __init__(
        self, generator: Generator, seeds: Sequence[int], rows: int | None = None, timestep: float | None = None
    ) -> None:
        self.generator, self.seeds, self._timestep = generator, list(seeds), timestep
        self.rows = rows or 2 * generator.batch_size  # as many as guided sampling has
        size = (generator.height, generator.width)
        self.denoiser = Denoiser.of(generator.checkpoint.unet, generator.scheduler, size=size)
        self._first = Denoiser.of(generator.one_step_denoiser(self.rows), generator.scheduler, size=size)
        self._empty: torch.Tensor | None = None

    @property
    def available(self) -> frozenset[Need]:
        """Return what this model offers to first-step detectors."""
        found = {Need.GUIDANCE} if self.generator.config.guidance > 1 else set()
        if has_cross_attention(self.generator.checkpoint.unet):
            found.add(Need.CROSS_ATTENTION)
        if len(self.seeds) > 1:
            found.add(Need.SEVERAL_SEEDS)
        return frozenset(found)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Return the timesteps of the sampling; the first one is replaced where another was asked for."""
        scheduler = self.generator.scheduler
        scheduler.set_timesteps(self.generator.config.steps)
        first, *others = (float(timestep) for timestep in scheduler.timesteps)
        return (first if self._timestep is None else self._timestep, *others)

    def first_outputs(self, step: FirstStep, prompt: int) -> torch.Tensor:
        """Return the outputs of one prompt that `Generator.generate` can reuse.

        Their shape is (2, S, C, h, w), or (1, ...) without guidance.
        """
        parts = (
            [step.outputs_PSCHW[prompt]] if step.empty_SCHW is None else [step.empty_SCHW, step.outputs_PSCHW[prompt]]
        )
        return torch.stack(parts)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> FirstStep:
        """Return one call for every caption and seed; captions are truncated as in sampling."""
        generator = self.generator
        text, empty = generator.text_encoder(captions).copy(), generator.empty_text()
        empty = None if empty is None else empty.copy()
        x_SCHW = first_input(generator.scheduler, generator.config.steps, self.seeds, generator.latent_shape)
        x_SCHW = x_SCHW.to(text.hidden_NTD.device)
        ends = self.timesteps
        level = self.denoiser.level(ends[0])
        if empty is not None and self._empty is None:
            self._empty = self._predict(x_SCHW, level, empty[[0] * len(x_SCHW)])
        prompts, seeds = len(captions), len(self.seeds)
        rows = [prompt for prompt in range(prompts) for _ in range(seeds)]
        outputs = self._predict(x_SCHW.repeat(prompts, 1, 1, 1), level, text[rows])
        shape = (prompts, *x_SCHW.shape)
        return FirstStep(x_SCHW, outputs.reshape(shape), self._empty, text, empty, self.denoiser, ends)

    def _predict(self, x_BCHW: torch.Tensor, level: Level, text: Text) -> torch.Tensor:
        spans = [range(at, min(at + self.rows, len(text))) for at in range(0, len(text), self.rows)]
        outputs = [self._first.output(x_BCHW[span.start : span.stop], level, text[span]) for span in spans]
        self.generator.count_calls(len(text))
        return torch.cat(outputs) if outputs else torch.empty_like(x_BCHW)
