"""This module is the first stage of a screened scan: one denoiser call per prompt and seed, and a decision per prompt.

    prompts ──▶ first step under a bank of seeds ──▶ score ──▶ census, audit: sampled in full
                (without caption once per seed)                  pass: a row without generations

It runs in the actor that samples, on the model that is loaded there. If the screen used the first timestep of the
sampling, the denoiser's answers stay with the prompt, and the sampling uses them instead of computing them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from memscan.config import ScreenConfig
from memscan.detection.decide import decide
from memscan.detection.first_step import FirstStepper, bank_seeds
from memscan.detection.one_step import DETECTORS
from memscan.errors import ModelError, Reason, RowReject
from memscan.models.generator import Generator
from memscan.worker.isolation import Isolation
from memscan.worker.prompt import Prompt


class Screen:
    """A screen scores prompts and decides on them.

    Raises:
        ModelError: the detector needs what the model has not (names it).
    """

    def __init__(self, rule: ScreenConfig, generator: Generator) -> None:
        self._rule = rule
        self.seeds = bank_seeds(rule.seeds, generator.config.base_seed)
        self._stepper = FirstStepper(generator, self.seeds, timestep=rule.timestep)
        self._detector = next(one for one in DETECTORS if one.spec.name == rule.detector)
        missing = self._detector.spec.missing(self._stepper.available)
        if missing:
            raise ModelError(
                f"{rule.detector} does not apply to this model: it needs {' and '.join(missing)}",
                where="screen.detector",
                hint="choose another detector, or leave out screen",
            )
        self._prompts = max(1, self._stepper.rows // rule.seeds)
        self._isolation = Isolation()

    @property
    def reused(self) -> int:
        """Return how many samples of a scanned prompt begin with the screen's step: those with the bank's seeds."""
        return len(self.seeds) if self._rule.timestep is None else 0

    def __call__(self, prompts: Sequence[Prompt | RowReject]) -> list[Prompt | RowReject]:
        """Return the prompts with their decisions, in place."""
        out: list[Prompt | RowReject] = []
        for at in range(0, len(prompts), self._prompts):
            out += self._isolation.batch(prompts[at : at + self._prompts], self._decide, Reason.SCREEN_FAILED)
        return out

    def scores(self, captions: Sequence[str]) -> list[float]:
        """Return scores alone, to choose a threshold by."""
        parts = [captions[at : at + self._prompts] for at in range(0, len(captions), self._prompts)]
        with torch.no_grad():
            return [value for part in parts for value in self._detector.score(self._stepper(part)).tolist()]

    def _decide(self, prompts: list[Prompt]) -> list[Prompt | RowReject]:
        with torch.no_grad():
            step = self._stepper([prompt.caption for prompt in prompts])
            scores = self._detector.score(step).tolist()
        out: list[Prompt | RowReject] = []
        for at, (prompt, score) in enumerate(zip(prompts, scores, strict=True)):
            if not math.isfinite(score):
                out.append(RowReject(Reason.SCREEN_FAILED, f"the score is {score}"))
                continue
            decided = decide(prompt.prompt_id, score, self._rule)
            first = self._stepper.first_outputs(step, at) if decided.scanned and self.reused else None
            out.append(Prompt(prompt.prompt_id, prompt.caption, decided, first))
        return out
