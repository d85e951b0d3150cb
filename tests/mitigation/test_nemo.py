"""NeMo against brute force and torchmetrics; its score on a denoiser whose memorisation is made by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memscan.mitigation.activations import ActivationStatistics, Moments, value_activations
from memscan.mitigation.nemo import THETA_END, NemoSettings, _schedule, candidates, refine, search
from memscan.mitigation.score import NoiseScore, Threshold
from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.union import clusters_by_images, prune, scoped
from memscan.mitigation.units import Layout, UnitSet
from memscan.models.denoiser import Denoiser

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_conventions(denoiser: Denoiser) -> None:
    make = lambda which: NoiseScore(  # noqa: E731
        denoiser, Layout.of(denoiser.unet), (4, 8, 8), dict(SCHEDULE), steps=10, convention=which
    )
    assert make("first").timestep > make("second").timestep


def test_deltas_are_noise_less_start(denoiser: Denoiser) -> None:
    score = NoiseScore(denoiser, Layout.of(denoiser.unet), (4, 8, 8), dict(SCHEDULE), steps=10, seeds=(4, 9))
    text = torch.randn(5, 16)
    found = score.deltas(text)
    for row, seed in enumerate((4, 9)):
        x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
        output = denoiser.unet(x[None], score.timestep, encoder_hidden_states=text[None]).sample[0] - x
        low, high = output.amin(dim=(1, 2), keepdim=True), output.amax(dim=(1, 2), keepdim=True)
        assert torch.allclose(found[row], (output - low) / (high - low), atol=1e-5)


def test_v_prediction_becomes_noise(unet: Any) -> None:
    v = Denoiser.of(unet, {**SCHEDULE, "prediction_type": "v_prediction"})
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 90]), torch.randn(2, 5, 16)
    a = v.alpha_bars[t].view(-1, 1, 1, 1)
    raw = unet(x, t, encoder_hidden_states=text).sample
    assert torch.allclose(v.noise(x, t, text), a.sqrt() * raw + (1 - a).sqrt() * x, atol=1e-6)
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    target = v.target(clean, noise, t)
    noisy = v.add_noise(clean, noise, t)  # from x_t and the true v, eps and x_0 come back
    assert torch.allclose(a.sqrt() * target + (1 - a).sqrt() * noisy, noise, atol=1e-5)
    assert torch.allclose(a.sqrt() * noisy - (1 - a).sqrt() * target, clean, atol=1e-5)


def test_threshold_is_mean_and_spread_of_all_pairs() -> None:
    matrices = [torch.tensor([[0, 0.2, 0.4], [0.2, 0, 0.6], [0.4, 0.6, 0]]), torch.full((3, 3), 0.1)]
    values = np.array([0.2, 0.4, 0.6, 0.1, 0.1, 0.1])
    found = Threshold.of(matrices)
    assert found.value == pytest.approx(values.mean() + values.std())
    assert found.prompts == 2


def test_candidates_by_hand() -> None:
    layout = Layout(("a", "b"), (3, 2))
    strength, z = torch.tensor([9.0, 1, 2, 5, 6]), torch.tensor([0.0, -6, 1, 2, 0])
    assert candidates(strength, z, layout, 5.0, 0) == UnitSet.of([("a", 1)])
    assert candidates(strength, z, layout, 5.0, 1) == UnitSet.of([("a", 1), ("a", 0), ("b", 1)])
    assert len(candidates(strength, z, layout, 5.0, 99)) == 5


def test_refinement_keeps_what_is_needed() -> None:
    """Against brute force over every subset: the refined set is enough, and no unit of it can return."""
    layout = Layout(("a", "b"), (4, 4))
    needed = {("a", 1), ("b", 0), ("b", 3)}

    def left(off: UnitSet) -> float:
        return 1.0 - 0.3 * len(needed & off.units)

    everything = UnitSet.of(layout.unit(flat) for flat in range(8))
    assert refine(everything, layout, left, 0.15).units == needed
    two = refine(everything, layout, left, 0.45)
    assert left(two) <= 0.45
    assert all(left(two - UnitSet.of([unit])) > 0.45 for unit in two)


class Copier(nn.Module):
    """A denoiser that memorises by hand: `units` of its value layer carry one pattern into the prediction."""

    def __init__(self, carriers: tuple[int, ...]) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleDict(
            {"0": nn.ModuleDict({"attn2": nn.ModuleDict({"to_v": nn.Linear(6, 12, bias=False)})})}
        )
        self.carriers = carriers
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("pattern", torch.randn(1, 2, 16, 16, generator=generator))
        self.register_buffer("mix", torch.randn(2, 2, generator=generator))
        with torch.no_grad():
            self.down_blocks["0"]["attn2"]["to_v"].weight.copy_(0.1 * torch.randn(12, 6, generator=generator))
            for unit in carriers:
                self.down_blocks["0"]["attn2"]["to_v"].weight[unit] = torch.tensor([0.0, 0, 0, 0, 0, 4.0])

    def forward(
        self, x: torch.Tensor, t: Any, encoder_hidden_states: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        values = self.down_blocks["0"]["attn2"]["to_v"](encoder_hidden_states).abs().mean(dim=1)
        amount = values[:, list(self.carriers)].prod(dim=1).view(-1, 1, 1, 1)
        noise = torch.einsum("ij,bjhw->bihw", self.mix, x)
        return (x + noise + amount * self.pattern,)


def hand_made(carriers: tuple[int, ...]) -> tuple[NoiseScore, ActivationStatistics, float]:
    model = Copier(carriers)
    layout = Layout(("down_blocks.0.attn2.to_v",), (12,))
    denoiser = Denoiser(model, torch.linspace(0.99, 0.01, 1000), "epsilon")
    score = NoiseScore(denoiser, layout, (2, 16, 16), dict(SCHEDULE), steps=10, seeds=range(5))
    generator = torch.Generator().manual_seed(1)
    ordinary = torch.randn(40, 3, 6, generator=generator)
    ordinary[:, :, 5] *= 0.05
    statistics = ActivationStatistics.join([Moments.of(value_activations(model, layout, ordinary))])
    # Halfway between a delta that the pattern fills (.98) and two that share nothing but the start (.2 to .45).
    return score, statistics, 0.7


@pytest.mark.parametrize("carriers", [(4,), (2, 9)])
def test_search_finds_the_units_that_were_planted(carriers: tuple[int, ...]) -> None:
    score, statistics, threshold = hand_made(carriers)
    memorised = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    memorised[:, 5] = 3.0
    found = search(memorised, score, statistics, threshold)
    assert found.seeds == 5
    assert found.reached
    assert found.score > threshold >= found.left
    # One carrier off is enough, since the pattern's amount is a product; brute force over single units agrees.
    before = score.deltas(memorised)
    rows = torch.arange(5)
    enough = [
        u for u in range(12) if score.left(memorised, before, UnitSet.of([score.layout.unit(u)]), rows) <= threshold
    ]
    assert tuple(enough) == carriers
    assert len(found.units) == 1
    assert next(iter(found.units))[1] in carriers


def test_search_leaves_an_ordinary_prompt_alone() -> None:
    score, statistics, threshold = hand_made((4,))
    ordinary = torch.randn(3, 6, generator=torch.Generator().manual_seed(11))
    ordinary[:, 5] = 0.0
    found = search(ordinary, score, statistics, threshold)
    assert found.units == UnitSet()
    assert found.seeds == 0


def test_extended_search_goes_on_where_the_published_one_ends() -> None:
    score, statistics, _ = hand_made((4,))
    memorised = torch.full((3, 6), 0.0)
    memorised[:, 5] = 3.0
    published = search(memorised, score, statistics, -1.0)  # a threshold that nothing reaches
    extended = search(memorised, score, statistics, -1.0, NemoSettings(extend=1.0))
    assert not published.reached
    assert published.theta == extended.theta == 1.0
    assert extended.candidates == 12 >= published.candidates


def test_union_and_prune() -> None:
    layout = Layout(("a",), (8,))
    units = {"p": UnitSet.of([("a", 0), ("a", 1)]), "q": UnitSet.of([("a", 1), ("a", 5)]), "r": UnitSet.of([("a", 7)])}
    clusters = {"p": "c0", "q": "c0", "r": "c1"}
    assert {name: len(one) for name, one in scoped(units, clusters, "prompt").items()} == {"p": 2, "q": 2, "r": 1}
    assert {name: len(one) for name, one in scoped(units, clusters, "cluster").items()} == {"c0": 3, "c1": 1}
    assert {name: len(one) for name, one in scoped(units, clusters, "all").items()} == {"all": 4}
    needs: list[Callable[[UnitSet], float]] = [
        lambda off: 0.0 if ("a", 1) in off.units else 1.0,
        lambda off: 0.0 if ("a", 5) in off.units else 1.0,
    ]
    kept = prune(scoped(units, clusters, "all")["all"], layout, needs, [0.5, 0.5])
    assert kept == UnitSet.of([("a", 1), ("a", 5)])


def test_clusters_are_connected_by_images() -> None:
    found = clusters_by_images({"b": ["1", "2"], "a": ["3"], "c": ["2", "4"], "d": ["4"], "e": []})
    assert found == {"a": "c0000", "b": "c0001", "c": "c0001", "d": "c0001", "e": "c0002"}


def test_the_search_ends_where_the_paper_says_or_where_the_code_does() -> None:
    """The authors' loop is left one round before the paper's: theta 1.25 and 15 units per layer."""
    layout = Layout(("a", "b"), (32, 32))
    ends = {name: list(_schedule(NemoSettings(theta_end=end), layout))[-1] for name, end in THETA_END.items()}
    assert ends == {"paper": (1.0, 16), "code": (1.25, 15)}


def test_settings_that_came_later_leave_the_name_of_a_folder_that_exists() -> None:
    settings = MitigationSettings(method="nemo")
    values = {
        key: value for key, value in settings.model_dump(mode="json").items() if key not in ("search_end", "wanda_rows")
    }
    before = hashlib.sha256(json.dumps({"settings": values}, sort_keys=True).encode()).hexdigest()[:16]
    assert settings.fingerprint({}) == before
    assert settings.model_copy(update={"search_end": "code"}).fingerprint({}) != before
