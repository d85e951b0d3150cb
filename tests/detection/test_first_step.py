"""First-step detectors against a denoiser whose scores and Jacobians are known, as a model of eps and as one of v."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as oracle_ms_ssim

from memscan.detection.base import Need
from memscan.detection.first_step import FirstStep
from memscan.detection.one_step import (
    DETECTORS,
    Anisotropy,
    AttentionEntropy,
    MidScheduleNoiseNorm,
    NoiseNorm,
    OneStepDcs,
    SeedSimilarity,
)
from memscan.detection.sharpness import Sharpness
from memscan.detection.similarity import Window, seed_similarity, similarity, unit_range
from memscan.models.denoiser import Denoiser
from memscan.models.schedulers import make_scheduler
from memscan.models.text import Text

SHAPE = (2, 4, 4)
SIZE = 32
PROMPTS, SEEDS = 3, 2
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Curved:
    """eps(x, t, text) = M x + tanh(x) * text / 1000 * t, with M fixed: its Jacobian is M + diag(...)."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.matrix = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(3)) / SIZE**0.5
        self.calls = 0

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: Any, **_: Any) -> Any:
        self.calls += len(x)
        flat, text = x.flatten(1), encoder_hidden_states.mean(dim=(1, 2))[:, None]
        eps = (flat @ self.matrix.T + torch.tanh(flat) * text * float(timestep) / 1000).reshape(x.shape)
        if self.scheduler.config.prediction_type == "epsilon":
            return (eps,)
        alpha_bar = self.scheduler.alphas_cumprod[int(timestep)]
        return ((eps - (1 - alpha_bar).sqrt() * x) / alpha_bar.sqrt(),)


def first_step(prediction_type: str) -> FirstStep:
    scheduler = make_scheduler("DDIMScheduler", SCHEDULE | {"prediction_type": prediction_type}, where="test")
    denoiser = Denoiser.of(Curved(scheduler), scheduler)
    source = torch.Generator().manual_seed(5)
    x = torch.randn(SEEDS, *SHAPE, generator=source)
    text = torch.randn(PROMPTS, 3, 4, generator=source)
    empty = torch.randn(1, 3, 4, generator=source)
    level = denoiser.level(981)
    outputs = denoiser.output(x.repeat(PROMPTS, 1, 1, 1), level, Text(text.repeat_interleave(SEEDS, dim=0)))
    uncond = denoiser.output(x, level, Text(empty.expand(SEEDS, -1, -1)))
    return FirstStep(
        x, outputs.reshape(PROMPTS, SEEDS, *SHAPE), uncond, Text(text), Text(empty), denoiser, (981.0, 41.0, 21.0, 1.0)
    )


@pytest.fixture
def step() -> FirstStep:
    return first_step("epsilon")


# Attention needs a UNet; the planted world's is in test_planted_detection.
ANALYTIC = [detector for detector in DETECTORS if not isinstance(detector, AttentionEntropy)]


@pytest.mark.parametrize("detector", ANALYTIC, ids=lambda detector: detector.spec.name)
def test_a_v_model_scores_as_the_eps_model_it_is(detector: Any) -> None:
    """One model in two parametrisations. v is eps divided by sqrt(a) = 0.07, so single precision keeps five digits."""
    one, other = detector.score(first_step("epsilon")), detector.score(first_step("v_prediction"))
    assert one.shape == (PROMPTS,)
    assert one.std() > 0
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("detector", ANALYTIC, ids=lambda detector: detector.spec.name)
def test_cost_is_what_the_card_says(detector: Any, step: FirstStep) -> None:
    """Calls of the network a prompt and seed: one of the first step, and the detector's own with the caption."""
    network: Any = step.denoiser.unet
    network.calls = 0
    detector.score(step)
    without_caption = SEEDS  # by level, not by prompt; sharpness has its own for every prompt
    own = network.calls / (PROMPTS * SEEDS)
    if isinstance(detector, Sharpness):
        assert 1 + own == detector.spec.calls
    elif isinstance(detector, MidScheduleNoiseNorm):
        assert network.calls == PROMPTS * SEEDS + without_caption  # in place of the first step, not after it
    elif isinstance(detector, Anisotropy):
        assert network.calls == PROMPTS * SEEDS * (detector.spec.calls - 1) + without_caption
    else:
        assert 1 + own == detector.spec.calls


def test_noise_norm_is_the_published_formula(step: FirstStep) -> None:
    expected = np.zeros(PROMPTS)
    for prompt in range(PROMPTS):
        for seed in range(SEEDS):
            difference = step.outputs_PSCHW[prompt, seed] - step.empty_SCHW[seed]  # type: ignore[index]
            expected[prompt] += float((difference.double() ** 2).sum() ** 0.5) / SEEDS
    np.testing.assert_allclose(NoiseNorm().score(step), expected, rtol=1e-5)


def test_a_probe_at_the_first_timestep_is_the_noise_norm(step: FirstStep) -> None:
    torch.testing.assert_close(MidScheduleNoiseNorm(981).score(step), NoiseNorm().score(step), rtol=1e-5, atol=1e-6)


def test_sharpness_is_the_product_with_the_written_out_jacobian(step: FirstStep) -> None:
    """H = -(1 / sigma) d(eps_c - eps_u)/dx is diagonal here: M falls out of the difference."""
    sigma = step.level.sigma
    expected = []
    for prompt in range(PROMPTS):
        gain = (step.text.hidden_NTD[prompt].mean() - step.empty.hidden_NTD.mean()) * 0.981  # type: ignore[union-attr]
        norms = []
        for x in step.x_SCHW.flatten(1):
            slope = gain * (1 - torch.tanh(x) ** 2)
            s = -gain * torch.tanh(x) / sigma
            norms.append((slope / sigma * s).norm())
        expected.append(torch.stack(norms).mean())
    torch.testing.assert_close(Sharpness("jvp").score(step), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_jvp_equals_finite_differences(step: FirstStep) -> None:
    """The difference's error falls with its step: to first order at 1e-2 of |x|, and tenfold less at 1e-3."""
    exact = Sharpness("jvp").score(step)
    coarse, fine = ((Sharpness("difference", width).score(step) - exact).abs().max() for width in (1e-2, 1e-3))
    torch.testing.assert_close(Sharpness("difference", 1e-3).score(step), exact, rtol=5e-3, atol=1e-5)
    assert fine < coarse / 4


def test_dcs_of_a_straight_line_is_the_width_of_the_step() -> None:
    """Where eps is the same everywhere, Heun's step is Euler's: (sigma_1 - sigma_0)^2 mean eps^2."""
    step = first_step("epsilon")
    constant = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    denoiser = replace(step.denoiser, unet=lambda x, *_args, **_kwargs: (constant.expand_as(x),))
    flat = FirstStep(
        step.x_SCHW,
        constant.expand(PROMPTS, SEEDS, *SHAPE),
        step.empty_SCHW,
        step.text,
        step.empty,
        denoiser,
        step.timesteps,
    )
    ratios = [step.denoiser.level(t).sigma / step.denoiser.level(t).alpha_bar ** 0.5 for t in (981, 961)]
    expected = (ratios[1] - ratios[0]) ** 2 * constant.square().mean()
    torch.testing.assert_close(OneStepDcs().score(flat), expected.expand(PROMPTS), rtol=1e-4, atol=1e-5)


def test_similarity_at_published_size_equals_torchmetrics() -> None:
    torch.manual_seed(0)
    a = unit_range(torch.nn.functional.avg_pool2d(torch.randn(3, 4, 128, 128), 2))
    b = unit_range(a + 0.1 * torch.randn_like(a))
    window = Window.fitting(64, 64)
    assert window == Window(11, 3)
    weights = (0.33, 0.33, 0.33)
    wanted = oracle_ms_ssim(a, b, data_range=1.0, kernel_size=11, betas=weights, reduction="none", normalize="relu")
    assert torch.allclose(similarity(a, b, window), wanted, atol=1e-5)
    assert torch.allclose(similarity(a, a, window), torch.ones(3), atol=1e-5)
    # The score of a prompt is the mean over the pairs of its seeds, of deltas scaled to [0, 1].
    moved = torch.stack([a, b], dim=1) * 3 - 7
    assert torch.allclose(seed_similarity(moved), wanted, atol=1e-4)


@pytest.mark.parametrize(("side", "window"), [(96, (11, 3)), (64, (11, 3)), (32, (5, 3)), (8, (3, 2)), (4, (3, 1))])
def test_window_fits_the_latents(side: int, window: tuple[int, int]) -> None:
    assert Window.fitting(side, side) == Window(*window)
    with pytest.raises(ValueError, match="too small"):
        Window.fitting(2, 2)


def test_similarity_of_equal_seeds_is_one_and_of_noise_is_low() -> None:
    source = torch.Generator().manual_seed(0)
    same = torch.randn(1, 1, 4, 8, 8, generator=source).expand(1, 3, 4, 8, 8)
    noise = torch.randn(1, 3, 4, 8, 8, generator=source)
    assert float(seed_similarity(same)) == pytest.approx(1, abs=1e-4)
    assert float(seed_similarity(noise)) < 0.3
    with pytest.raises(ValueError, match="two of them"):
        seed_similarity(noise[:, :1])


def test_without_guidance_what_needs_it_does_not_apply(step: FirstStep) -> None:
    available = {Need.SEVERAL_SEEDS}
    applies = {d.spec.name for d in DETECTORS if not d.spec.missing(available)}
    assert applies == {SeedSimilarity.spec.name, OneStepDcs.spec.name}
    assert NoiseNorm.spec.missing(available) == ["an unconditional prediction"]
    blind = FirstStep(step.x_SCHW, step.outputs_PSCHW, None, step.text, None, step.denoiser, step.timesteps)
    with pytest.raises(ValueError, match="guidance is off"):
        NoiseNorm().score(blind)
