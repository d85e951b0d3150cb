"""Maps against written-out Jacobians: a small network with an exact diagonal, and one in both parametrisations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memscan.localization.maps import (
    Point,
    caption_curvature,
    curvature,
    foreground_share,
    hutchinson,
    score_difference,
)
from memscan.models.denoiser import Denoiser
from memscan.models.schedulers import make_scheduler
from memscan.models.text import Text

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (3, 2, 4, 4)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 3, padding=1)).requires_grad_(False)


def exact_diagonal(function: Any, x: torch.Tensor) -> torch.Tensor:
    """Row by row from the full Jacobian."""
    size = x[0].numel()
    rows = [
        torch.autograd.functional.jacobian(lambda one: function(one[None])[0], row).reshape(size, size).diagonal()
        for row in x
    ]
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.long
def test_hutchinson_comes_to_the_exact_diagonal() -> None:
    """Unbiased with an error of 1 / sqrt(K): 4,096 probes come as near as six standard errors of the off-diagonal."""
    net, x = network(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    exact = exact_diagonal(net, x)
    few, many = (hutchinson(net, x, probes=probes) for probes in (16, 4096))
    assert (many - exact).abs().max() < 0.03 * exact.abs().max() + 0.02
    assert (many - exact).norm() < (few - exact).norm() / 4


def test_one_probe_is_enough_where_the_jacobian_is_diagonal() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hutchinson(torch.sin, x, probes=1), torch.cos(x))


class Pointwise:
    """eps = tanh(x) * text: everything about it is diagonal."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: Any, **_: Any) -> Any:
        eps = torch.tanh(x) * encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        if self.scheduler.config.prediction_type == "epsilon":
            return (eps,)
        alpha_bar = self.scheduler.alphas_cumprod[int(timestep)]
        return ((eps - (1 - alpha_bar).sqrt() * x) / alpha_bar.sqrt(),)


def setup(prediction: str) -> tuple[Denoiser, Point]:
    scheduler = make_scheduler("DDIMScheduler", SCHEDULE | {"prediction_type": prediction}, where="test")
    denoiser = Denoiser.of(Pointwise(scheduler), scheduler)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    text, empty = Text(torch.full((3, 2, 2), 3.0)), Text(torch.full((1, 2, 2), 1.0))
    return denoiser, Point(x, denoiser.level(41), text, empty)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_maps_have_their_closed_forms(prediction: str) -> None:
    """Of both parametrisations; single precision through v keeps four digits."""
    denoiser, point = setup(prediction)
    slope = 1 - torch.tanh(point.x_BCHW) ** 2
    near: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(curvature(denoiser, point, probes=1), (3 * slope / point.level.sigma).sum(dim=1), **near)
    torch.testing.assert_close(
        caption_curvature(denoiser, point, probes=1), (2 * slope / point.level.sigma).sum(dim=1), **near
    )
    difference = (2 * torch.tanh(point.x_BCHW) / point.level.sigma).square().sum(dim=1)
    torch.testing.assert_close(score_difference(denoiser, point), difference, **near)


def test_without_guidance_there_is_no_difference() -> None:
    denoiser, point = setup("epsilon")
    blind = Point(point.x_BCHW, point.level, point.text, None)
    with pytest.raises(ValueError, match="guidance is off"):
        score_difference(denoiser, blind)
    assert curvature(denoiser, blind).shape == (3, 4, 4)


def test_share_of_the_mass_in_the_foreground() -> None:
    values = torch.zeros(4, 4)
    values[:, 0], values[:, 3] = 3.0, 1.0
    mask = torch.zeros(32, 32)
    mask[:, :8] = 1
    assert foreground_share(values, mask) == pytest.approx(0.75)
    assert foreground_share(torch.zeros(4, 4), mask) is None
    assert foreground_share(torch.full((4, 4), torch.nan), mask) is None
