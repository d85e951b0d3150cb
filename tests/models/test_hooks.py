"""Signals against predictions that are known by construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memscan.models.generator import Generator
from memscan.models.hooks import NoiseNormHook
from memscan.models.sampling import Condition, initial_latents, sample
from memscan.models.schedulers import make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class KnownDenoiser:
    """A denoiser that knows the clean image: rows with the caption see `cond`, the others `uncond`."""

    def __init__(self, cond: torch.Tensor, uncond: torch.Tensor, prediction_type: str) -> None:
        self.clean = torch.cat([uncond, cond])
        self.prediction_type = prediction_type
        betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2  # type: ignore[operator]
        self.alpha_bars = torch.cumprod(1 - betas, 0)
        self.seen: list[torch.Tensor] = []

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, **_kwargs: Any) -> tuple[torch.Tensor]:
        alpha_bar = self.alpha_bars[int(timestep)]
        noise = (x_t - alpha_bar.sqrt() * self.clean) / (1 - alpha_bar).sqrt()
        self.seen.append(noise)
        if self.prediction_type == "epsilon":
            return (noise,)
        return (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.clean,)


class Recorder:
    def begin(self, count: int) -> None:
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_step(self, index: int, timestep: float, latents: Any, noise_cond: Any, noise_uncond: Any) -> None:
        assert index == len(self.rows)
        self.rows.append((noise_uncond, noise_cond))

    def result(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_hooks_see_epsilon_in_every_notation(scheduler: str, prediction_type: str) -> None:
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 2, 4, 4, 4)
    denoiser = KnownDenoiser(cond, uncond, prediction_type)
    # Trailing timesteps are whole numbers, so that the table above has them.
    config = SCHEDULE | {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    noise, generators = initial_latents([1, 2], (4, 4, 4))
    recorder, norms = Recorder(), NoiseNormHook()
    sample(
        denoiser,
        make_scheduler(scheduler, config, where="test"),
        Condition(torch.zeros(2, 3, 5), torch.zeros(1, 3, 5), 3.0),
        noise,
        generators,
        5,
        [recorder, norms],
    )
    assert len(denoiser.seen) == len(recorder.rows) == 5
    for expected, seen in zip(denoiser.seen, recorder.rows, strict=True):
        torch.testing.assert_close(torch.cat(seen), expected, rtol=2e-3, atol=2e-3)
    expected_norms = np.array(
        [[float((rows[2 + b] - rows[b]).pow(2).sum().sqrt()) for b in range(2)] for rows in denoiser.seen]
    )
    signals = norms.result()
    np.testing.assert_allclose(signals["noise_norm"], expected_norms.mean(axis=0), rtol=5e-3)
    np.testing.assert_allclose(signals["noise_norm_first"], expected_norms[0], rtol=5e-3)
    assert signals["noise_norm"].dtype == np.float32


def test_no_guidance_no_signal(make_generator: Callable[..., Generator]) -> None:
    assert make_generator(guidance=1.0, steps=1).generate(["a"], [1]).signals == {}


def test_signals_have_one_value_an_image_over_batches(make_generator: Callable[..., Generator]) -> None:
    signals = make_generator(batch_size=2, steps=2).generate(["the cat", "a dog", "b"], [1, 2, 3]).signals
    assert {name: values.shape for name, values in signals.items()} == {"noise_norm": (3,), "noise_norm_first": (3,)}
    assert len(set(signals["noise_norm"].tolist())) == 3


def test_a_run_without_hooks(make_generator: Callable[..., Generator]) -> None:
    with_taps, without = (make_generator(hooks=hooks, steps=2).generate(["a"], [1]) for hooks in (None, ()))
    assert without.signals == {}
    np.testing.assert_array_equal(with_taps.images_BHWC, without.images_BHWC)
