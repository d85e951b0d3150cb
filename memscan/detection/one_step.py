"""This module has the first-step detectors.

They give scores (P,) of P prompts from one `FirstStep`, as means over its seeds.

Each class carries an `DetectorSpec`; `DETECTORS` has one of each. None changes the first step.
"""

from __future__ import annotations

from typing import Protocol

import torch

from memscan.detection.base import DetectorSpec, Need
from memscan.detection.first_step import FirstStep
from memscan.detection.sharpness import Sharpness
from memscan.detection.similarity import seed_similarity
from memscan.models.attention import AttentionRecorder, entropy
from memscan.models.denoiser import Level
from memscan.models.text import Text

_CHUNK = 64  # latents in one batch of a detector's own calls


class FirstStepDetector(Protocol):
    """A first-step detector scores prompts by their first step."""

    @property
    def spec(self) -> DetectorSpec:
        """Return its specification."""

    def score(self, step: FirstStep) -> torch.Tensor:
        """Return scores (P,) float32; higher is more memorised."""


class NoiseNorm:
    """This score is ||eps_c - eps_u||_2 over all channels and positions (Wen et al. 2024, section 3.2)."""

    spec = DetectorSpec("noise_norm", "Wen 2024", frozenset({Need.GUIDANCE}), calls=1)

    def score(self, step: FirstStep) -> torch.Tensor:
        return _norms(step.difference_PSCHW)


class MidScheduleNoiseNorm:
    """This score is ||eps_c - eps_u||_2 of pure noise, with one call at `timestep` instead of T.

    The model is thus told that the input has less noise.

    At T a prediction is the mean of what the caption allows, and a caption that names colours and shapes moves it as
    far as a memorised one does. Told of less noise, a model answers with a picture. Asthana and Belagiannis 2026 feed
    pure noise at another level for their angle; here the norm does better (docs/detection.md). A sampling cannot take
    this call up.

    Args:
        timestep: training timestep that the model is given, out of 1,000. Chosen on planted world 2.
    """

    spec = DetectorSpec("noise_norm_probe", "Wen 2024 at t = 500", frozenset({Need.GUIDANCE}), calls=1)

    def __init__(self, timestep: float = 500.0) -> None:
        self.timestep = timestep

    def score(self, step: FirstStep) -> torch.Tensor:
        return _norms(predicted_difference(step, step.denoiser.level(self.timestep))[0])


class SeedSimilarity:
    """This score is the similarity of delta = eps_c - x_T between seeds.

    Source: Hintersdorf et al. 2024, NeMo, section 3.1.
    """

    spec = DetectorSpec("seed_similarity", "NeMo 2024", frozenset({Need.SEVERAL_SEEDS}), calls=1)

    def score(self, step: FirstStep) -> torch.Tensor:
        return seed_similarity(step.cond_PSCHW - step.x_SCHW[None])


class AttentionEntropy:
    """This score is the entropy of the cross-attention over tokens at the first step (Ren et al. 2024).

    It is the mean over layers.

    Its probabilities are not in a `FirstStep`, so the calls are made again unless another detector needs them too.
    """

    spec = DetectorSpec("attention_entropy_first", "Ren 2024", frozenset({Need.CROSS_ATTENTION}), calls=2)

    def score(self, step: FirstStep) -> torch.Tensor:
        values = []
        with AttentionRecorder(step.denoiser.unet) as recorder:
            for x, text in row_batches(step, step.x_SCHW.repeat(len(step.text), 1, 1, 1)):
                step.denoiser.output(x, step.level, text)
                values.append(torch.stack([entropy(layer.rows_BPT) for layer in recorder.take()]).mean(dim=0))
        return torch.cat(values).reshape(len(step.text), -1).mean(dim=1)


class OneStepDcs:
    """This score is mean (z_0 - z_1)^2 over one Heun step from pure noise, with the caption only.

    Source: Webster 2023, section 4.1.

    The step is taken in the notation of the paper, z = x / sqrt(a) with noise level sigma = sqrt((1 - a) / a), from the
    first timestep to the one a fiftieth of the schedule below it.
    """

    spec = DetectorSpec("one_step_dcs", "Webster 2023", calls=2)

    def score(self, step: FirstStep) -> torch.Tensor:
        start = step.level
        end = step.denoiser.level(max(0.0, start.timestep - 20.0))
        width = _noise_ratio(end) - _noise_ratio(start)
        z_SCHW = step.x_SCHW / start.alpha_bar**0.5
        slope_PSCHW = step.cond_PSCHW
        moved = (z_SCHW[None] + width * slope_PSCHW).flatten(0, 1) * end.alpha_bar**0.5
        second = torch.cat([step.denoiser.epsilon(x, end, text) for x, text in row_batches(step, moved)])
        second = second.reshape(slope_PSCHW.shape)
        return (width * (slope_PSCHW + second) / 2).flatten(1).square().mean(dim=1)


class Anisotropy:
    """This score is ||eps_c - eps_u|| near t = T plus `weight` times cos(s_c - s_u, s_u) near t = 0.

    Both terms are computed on the same pure noise.

    Source: Asthana and Belagiannis, ICLR 2026; weights 1 and 2 are their code's for SD1.
    """

    spec = DetectorSpec("anisotropy", "Asthana 2026", frozenset({Need.GUIDANCE}), calls=2)

    def __init__(self, weight: float = 2.0) -> None:
        self.weight = weight

    def score(self, step: FirstStep) -> torch.Tensor:
        difference_PSCHW, uncond_SCHW = predicted_difference(step, step.denoiser.level(step.timesteps[-1]))
        # Scores are -eps / sigma: sign and scale fall out of the cosine.
        cosine = torch.cosine_similarity(difference_PSCHW.flatten(2), uncond_SCHW[None].flatten(2), dim=2)
        return _norms(step.difference_PSCHW) + self.weight * cosine.mean(dim=1)


def _norms(difference_PSCHW: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(difference_PSCHW.flatten(2), dim=2).mean(dim=1)
    return norms


def predicted_difference(
    step: FirstStep, level: Level, x_SCHW: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """eps_c - eps_u (P, S, C, h, w) and eps_u (S, C, h, w) at another level, of the same pure noise or of `x_SCHW`."""
    assert step.empty is not None, "a detector that needs guidance"
    seen_SCHW = step.x_SCHW if x_SCHW is None else x_SCHW
    uncond = step.denoiser.epsilon(seen_SCHW, level, step.empty[[0] * len(seen_SCHW)])
    repeated = seen_SCHW.repeat(len(step.text), 1, 1, 1)
    cond = torch.cat([step.denoiser.epsilon(x, level, text) for x, text in row_batches(step, repeated)])
    return cond.reshape(len(step.text), *uncond.shape) - uncond[None], uncond


def row_batches(step: FirstStep, x_BCHW: torch.Tensor) -> list[tuple[torch.Tensor, Text]]:
    """(x, text) batches of all prompts and seeds, prompt by prompt."""
    owner = [prompt for prompt in range(len(step.text)) for _ in step.x_SCHW]
    spans = [slice(at, at + _CHUNK) for at in range(0, len(owner), _CHUNK)]
    return [(x_BCHW[span], step.text[owner[span]]) for span in spans]


def _noise_ratio(level: Level) -> float:
    return float(level.sigma / level.alpha_bar**0.5)


DETECTORS: tuple[FirstStepDetector, ...] = (
    NoiseNorm(),
    MidScheduleNoiseNorm(),
    SeedSimilarity(),
    AttentionEntropy(),
    OneStepDcs(),
    Anisotropy(),
    Sharpness("difference"),
    Sharpness("jvp"),
)
