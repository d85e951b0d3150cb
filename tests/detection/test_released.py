"""The authors' forms of detectors: by hand on a small denoiser, and against stored outputs of their code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.parity.cases import attention_case
from benchmarks.parity.table import stored
from memscan.detection.first_step import FirstStep
from memscan.detection.released import CellAnisotropy, GuidedDcs, SingleDcs, padded_entropy, single_entropy
from tests.detection.test_first_step import first_step


@pytest.fixture
def step() -> FirstStep:
    return first_step("epsilon")


def test_guided_dcs_is_one_full_step_to_no_noise(step: FirstStep) -> None:
    """In the code's own notation: z_0 is sigma times noise, the network sees z / sqrt(sigma^2 + 1)."""
    network = step.denoiser
    alpha_bar = float(network.alpha_bars[-1])
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
    z_SCHW = step.x_SCHW * sigma
    seen = z_SCHW / (sigma**2 + 1) ** 0.5
    level = network.level(len(network.alpha_bars) - 1)
    expected = []
    assert step.empty is not None
    uncond = network.epsilon(seen, level, step.empty[[0] * len(seen)])
    for prompt in range(len(step.text)):
        cond = network.epsilon(seen, level, step.text[[prompt] * len(seen)])
        z_1 = z_SCHW - sigma * (uncond + 7.5 * (cond - uncond))
        expected.append(float(((z_SCHW - z_1) ** 2).mean()))
    np.testing.assert_allclose(GuidedDcs().score(step).numpy(), expected, rtol=1e-4)


def test_a_single_call_is_the_mean_square_of_its_prediction(step: FirstStep) -> None:
    expected = (step.outputs_PSCHW.double() ** 2).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(SingleDcs().score(step).double(), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_anisotropy_takes_the_cosine_at_every_position(kind: str) -> None:
    step = first_step(kind)
    level = step.denoiser.level(step.timesteps[-3])
    assert step.empty is not None
    uncond = step.denoiser.output(step.x_SCHW, level, step.empty[[0] * len(step.x_SCHW)]).double()
    weight, scale = (2.0, 1.0) if kind == "epsilon" else (0.1, 1 / step.level.sigma**2)
    expected = []
    for prompt in range(len(step.text)):
        cond = step.denoiser.output(step.x_SCHW, level, step.text[[prompt] * len(step.x_SCHW)]).double()
        change = cond - uncond
        cosine = (change * uncond).sum(1) / (change.norm(dim=1) * uncond.norm(dim=1))
        norm = step.difference_PSCHW[prompt].double().flatten(1).norm(dim=1).mean() * scale
        expected.append(float(norm + weight * cosine.mean()))
    np.testing.assert_allclose(CellAnisotropy().score(step).numpy(), expected, rtol=1e-4)


def test_entropies_are_those_of_the_released_script() -> None:
    known = stored("attention")["values"]
    shares_CLBT, ends_B = (torch.from_numpy(part) for part in attention_case())
    padded = padded_entropy(shares_CLBT.mean(dim=1)[-10:], shares_CLBT[0].mean(dim=0), ends_B)
    np.testing.assert_allclose(padded.numpy(), known["D"], rtol=1e-6)
    np.testing.assert_allclose(single_entropy(shares_CLBT[0, 3]).numpy(), known["E"], rtol=1e-6)
