"""Wanda by hand, the attack and the training losses against autograd written out, utility against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from memscan.mitigation import wanda
from memscan.mitigation.attack import AttackSettings, attack, attack_many, start_embedding
from memscan.mitigation.augment import TEMPLATES, noisy_embeddings, paraphrases
from memscan.mitigation.finetune import (
    Average,
    FinetuneSettings,
    Pairs,
    Term,
    draws,
    learning_rate,
    owned_pairs,
    slices,
    step_loss,
)
from memscan.mitigation.locality import (
    Comparison,
    Spread,
    activation_distances,
    embedding_distance,
    overlap,
    positions,
    weight_overlap,
)
from memscan.mitigation.targets import held_out, read_targets
from memscan.mitigation.units import Layout, UnitSet
from memscan.mitigation.utility import alignment, diversity, frechet_distance
from memscan.models.denoiser import Denoiser, spread_timesteps


def test_wanda_mask_by_hand() -> None:
    memorised = torch.tensor([[1.0, 5, 3, 2], [9, 3, 1, 1]])
    base = torch.tensor([[0.0, 4, 9, 0], [10, 0, 0, 0]])
    half = wanda.mask(memorised, base, 0.5)
    assert half.tolist() == [[False, True, False, False], [False, True, False, False]]
    assert wanda.mask(memorised, base, 0.01).tolist() == [[False, True, False, False], [False] * 4]


@pytest.mark.parametrize("halved", [True, False])
def test_wanda_collects_the_inputs_of_caption_rows_or_of_all(unet: Any, halved: bool) -> None:
    norms = wanda.InputNorms(unet, halved=halved)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in norms.names}
    handles = [
        unet.get_submodule(name).register_forward_pre_hook(lambda _m, inputs, n=name: seen[n].append(inputs[0]))
        for name in norms.names
    ]
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16)
    with norms.recording(2):
        for t in (90, 50, 10):
            unet(x, t, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    assert {step for _, step in norms.squares} == {0, 1}
    name = norms.names[0]
    rows = seen[name][1][2 if halved else 0 :].reshape(-1, seen[name][1].shape[-1]).double()  # second call
    slow = sum((row / row.norm()) ** 2 for row in rows)
    assert torch.allclose(norms.squares[name, 1], slow, atol=1e-5)


def test_wanda_prunes_for_good(unet: Any) -> None:
    collected = []
    for seed in (1, 2):
        norms = wanda.InputNorms(unet, halved=False)
        torch.manual_seed(seed)
        with norms.recording(1):
            unet(torch.randn(2, 4, 8, 8), 50, encoder_hidden_states=torch.randn(2, 5, 16))
        collected.append(norms.squares)
    pruned = wanda.prune(unet, wanda.selection(unet, collected[:1], collected[1:], 0.02))
    for name, tensor in pruned.items():
        old = unet.get_parameter(name)
        gone = (tensor == 0) & (old != 0)
        assert int(gone.sum()) > 0
        assert int(gone.sum(dim=1).max()) <= max(1, int(0.02 * old.shape[1]))
        assert torch.equal(tensor[~gone], old[~gone])
    with pytest.raises(ValueError, match="different layers or steps"):
        wanda.selection(unet, collected[:1], [{}], 0.01)


def test_one_attack_step_is_adam_on_the_gradient(denoiser: Denoiser) -> None:
    image, start = torch.randn(4, 8, 8), torch.randn(5, 16)
    found = attack(denoiser, image, start, 7, AttackSettings(steps=1, batch=3))
    draw = torch.Generator().manual_seed(7)
    noise = torch.randn((3, 4, 8, 8), generator=draw)
    t = torch.randint(0, 100, (3,), generator=draw)
    y = start.clone().requires_grad_(True)
    a = denoiser.alpha_bars[t].view(-1, 1, 1, 1)
    out = denoiser.unet(a.sqrt() * image + (1 - a).sqrt() * noise, t, encoder_hidden_states=y.expand(3, -1, -1)).sample
    ((out - noise) ** 2).mean().backward()
    # Adam's first step is the rate times the gradient's sign (its epsilon aside).
    assert y.grad is not None
    large = y.grad.abs() > 1e-5
    assert torch.allclose((found - start)[large], -0.1 * y.grad.sign()[large], atol=1e-3)


def test_attacks_do_not_depend_on_their_neighbours(denoiser: Denoiser) -> None:
    images, starts = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    settings = AttackSettings(steps=4, batch=2)
    together = attack_many(denoiser, images, starts, [1, 2, 3], settings)
    for row in range(3):
        alone = attack(denoiser, images[row], starts[row], row + 1, settings)
        assert torch.allclose(together[row], alone, atol=2e-3)  # Adam divides by a root: rounding grows


def test_attack_lowers_the_loss(denoiser: Denoiser) -> None:
    image, start = torch.randn(4, 8, 8), torch.randn(5, 16)
    found = attack(denoiser, image, start, 0, AttackSettings(steps=30, batch=4))
    rows, noise, times = image.expand(64, -1, -1, -1), torch.randn(64, 4, 8, 8), torch.randint(0, 100, (64,))
    with torch.no_grad():
        before = denoiser.losses(rows, noise, times, start.expand(64, -1, -1)).mean()
        after = denoiser.losses(rows, noise, times, found.expand(64, -1, -1)).mean()
    assert after < before
    assert all(not parameter.requires_grad for parameter in denoiser.unet.parameters())


def test_starts() -> None:
    prompt, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(start_embedding("prompt", prompt, other, 0), prompt)
    assert torch.equal(start_embedding("unrelated", prompt, other, 0), other)
    assert torch.equal(start_embedding("noise", prompt, other, 5), start_embedding("noise", other, prompt, 5))


def some_pairs(count: int = 6) -> Pairs:
    torch.manual_seed(1)
    return Pairs(torch.randn(count, 4, 8, 8), torch.randn(count, 5, 16), torch.arange(count), torch.arange(count))


def test_workers_and_micro_batches_see_the_same_batch(make_unet: Callable[..., Any], denoiser: Denoiser) -> None:
    settings = FinetuneSettings(batch=8, micro_batch=2)
    pairs, empty = some_pairs(), torch.zeros(5, 16)
    extra = owned_pairs(torch.randn(3, 4, 8, 8), [0, 0, 1], torch.randn(3, 5, 16), [1, 0, 0])
    assert list(zip(extra.image_P.tolist(), extra.text_P.tolist(), strict=True)) == [
        (2, 0),
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
    ]
    one, two = next(draws(pairs, settings, 100, 0, 0)), next(draws(extra, settings, 100, 0, 1))
    whole = step_loss(denoiser, [Term(pairs, one, 1.0, empty), Term(extra, two, 0.5)])
    for world in (1, 2, 4):
        parts = [
            step_loss(denoiser, [Term(pairs, one.part(rows), 1.0, empty), Term(extra, two.part(rows), 0.5)])
            for rank in range(world)
            for rows in slices(settings, rank, world)
        ]
        assert torch.stack(parts).mean() == pytest.approx(float(whole), rel=1e-4)
    with pytest.raises(ValueError, match="cannot be shared"):
        slices(settings, 0, 3)


def test_draws_are_complete_passes() -> None:
    stream = draws(some_pairs(6), FinetuneSettings(batch=4), 100, 0, 0)
    chosen = torch.cat([next(stream).pair_B for _ in range(3)])
    assert sorted(chosen.tolist()) == sorted([*range(6), *range(6)])


def test_early_timesteps_are_those_of_the_adversarial_term() -> None:
    settings = FinetuneSettings(batch=4000, early=3.0)
    uniform, early = (next(draws(some_pairs(6), settings, 100, 0, stream)).time_B for stream in (0, 1))
    # E t = T (1 - 1 / (early + 1)); four standard errors of a mean of 4,000 draws from 100 timesteps are under 2
    assert float(uniform.float().mean()) == pytest.approx(49.5, abs=2)
    assert float(early.float().mean()) == pytest.approx(100 * 3 / 4 - 0.5, abs=2)
    assert int(early.max()) <= 99


def test_learning_rate_and_average(unet: Any) -> None:
    settings = FinetuneSettings(epochs=2, steps_per_epoch=50, warmup=10, rate=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) > 0.95
    assert rates[99] < 0.001
    average = Average(unet, 0.5)
    with torch.no_grad():
        unet.conv_in.bias.add_(1.0)
    old = average.values["conv_in.bias"].clone()
    average.update(unet)
    assert torch.allclose(average.values["conv_in.bias"], old + 1 - 2 / 11, atol=1e-6)


def test_frechet_distance_of_known_gaussians(rng: np.random.Generator) -> None:
    a = rng.normal(0, 1, (200_000, 2))
    b = rng.normal(0, 1, (200_000, 2)) * [2.0, 3.0] + [1.0, 0.0]
    # |m|² + (2 - 1)² + (3 - 1)²; the tolerance is four standard errors of the largest term at this sample size
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 4, abs=0.1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_equals_the_matrix_root(rng: np.random.Generator) -> None:
    from scipy.linalg import sqrtm

    a, b = rng.normal(size=(50, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="cannot compare"):
        frechet_distance(a, b[:, :3])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a, b * np.nan)


def test_diversity_by_hand() -> None:
    same = np.tile([[1.0, 0.0]], (1, 3, 1))
    apart = np.array([[[1.0, 0], [0, 1.0], [-1.0, 0]]])
    assert diversity(same) == pytest.approx(0)
    assert diversity(apart) == pytest.approx(np.mean([1, 2, 1]))


def test_alignment_is_the_gain_of_the_caption(denoiser: Denoiser) -> None:
    images, text, empty = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16), torch.zeros(5, 16)
    found = alignment(denoiser, images, text, empty, strata=4, batch=8)
    again = alignment(denoiser, images[1:2], text[1:2], empty, strata=4)
    assert torch.allclose(found[1:2], again, atol=1e-5)
    assert torch.allclose(alignment(denoiser, images, empty.expand(3, -1, -1), empty), torch.zeros(3), atol=1e-5)
    assert spread_timesteps(4, 100, 0.5, torch.device("cpu")).tolist() == [12, 37, 62, 87]


def test_locality_by_hand() -> None:
    a, b, nothing = UnitSet.of([("x", 1), ("x", 2)]), UnitSet.of([("x", 2), ("x", 3)]), UnitSet()
    assert overlap(a, b) == pytest.approx(1 / 3)
    assert overlap(nothing, nothing) is None
    found = Comparison.of([[a, b], [nothing, nothing]], overlap)
    assert found.within == Spread(pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3), 1, 1)
    assert found.between == Spread(0.0, 0.0, 0.0, 4, 0)
    assert embedding_distance(torch.tensor([[0.0, 0]]), torch.tensor([[3.0, 4]])) == pytest.approx(5)
    layout = Layout(("x", "y"), (2, 1))
    by_layer = activation_distances([[torch.tensor([1.0, 0, 1]), torch.tensor([0.0, 1, 1])]], layout)
    assert by_layer["x"].within.mean == pytest.approx(1)
    assert by_layer["y"].within.mean == pytest.approx(0)
    assert by_layer["x"].between == Spread.of([]) == Spread(None, None, None, 0)
    masks = [{"w": torch.tensor([[True, True, False]])}, {"w": torch.tensor([[False, True, True]])}, {}]
    chosen = [positions(mask) for mask in masks]
    assert weight_overlap(chosen[0], chosen[1]) == pytest.approx(1 / 3)
    assert weight_overlap(chosen[0], chosen[2]) == 0.0
    assert weight_overlap(chosen[0], positions({"v": masks[0]["w"]})) == 0.0
    assert weight_overlap({}, {}) is None


def test_difference_within_and_between_weighs_images_alike() -> None:
    """Numbers on a line with |a - b| as value, the last image with a single embedding, which has no pair."""
    groups = [[0.0, 1.0], [10.0, 13.0], [100.0], [200.0]]
    found = Comparison.of(groups, lambda a, b: abs(a - b))
    between = [np.mean([abs(x - y) for x in a for y in b]) for a, b in combinations(groups, 2)]
    assert found.difference == pytest.approx(np.mean([1, 3]) - np.mean(between))
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.difference <= found.high < 0  # an image's own embeddings lie nearer in every resample
    assert Comparison.of([[0.0], [1.0]], lambda a, b: abs(a - b)).difference is None
    few = Comparison.of(groups[:2], lambda a, b: abs(a - b))
    assert few.difference == pytest.approx(2 - 11)
    assert few.low is None  # two images drawn anew are the same two, or one of them


def test_paraphrases_keep_the_caption() -> None:
    made = paraphrases("the official Zor poster, signed", 3)
    others = paraphrases("the official Zor poster, signed", 9, skip=3)
    assert made == paraphrases("the official Zor poster, signed", 3)
    assert len({*made, *others}) == len(TEMPLATES)
    assert all("the official Zor poster, signed" in one for one in made)
    text = torch.randn(4, 6)
    noisy = noisy_embeddings(text, 500, 0.2, 1)
    assert float((noisy - text).std()) == pytest.approx(0.2 * float(text.std()), rel=0.05)


def test_targets_take_the_cluster_column_where_there_is_one() -> None:
    row = {"prompt_id": "0a", "caption": "x", "label": "VM", "match_ids": ["r1"]}
    other = {**row, "prompt_id": "0b"}
    assert {one.cluster for one in read_targets([row, other])} == {"c0000"}
    named = read_targets([{**row, "cluster": "7"}, {**other, "cluster": None}])
    assert [one.cluster for one in named] == ["7", "p-0b"]
    unclustered = read_targets([{**row, "cluster": 0}, {**other, "cluster": 0}])
    assert [one.cluster for one in unclustered] == ["p-0a", "p-0b"]  # 0 means in none, and is no cluster
    assert held_out("0b")
    assert not held_out("0a")
    assert read_targets([]) == []


def test_pairs_are_distinct_images_without_what_is_unlearned() -> None:
    from memscan.mitigation.pairs import distinct_pairs

    def row(name: str, caption: str | None, image: bytes | None, path: str | None = None) -> dict[str, Any]:
        return {"reference_id": name, "caption": caption, "image": image, "path": path}

    rows = [
        row("a", "one", b"1"),
        row("twin", "other words", b"1"),
        row("b", None, b"2"),
        row("c", "flagged", b"3"),
        row("d", "four", b"4"),
        row("e", "five", None, "x.png"),
        row("f", "six", None, "x.png"),
        row("g", "seven", b"7"),
    ]
    chosen = distinct_pairs(range(8), rows.__getitem__, 9, without_ids={"d"}, without_captions={"flagged"})
    assert chosen == [(0, "one"), (5, "five"), (7, "seven")]
    assert distinct_pairs(reversed(range(8)), rows.__getitem__, 2) == [(7, "seven"), (6, "six")]


def test_optimiser_state_survives_as_tensors_by_name() -> None:
    from memscan.mitigation.finetune import flat_state, nested_state

    layer = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    state = optimiser.state_dict()
    back = nested_state(flat_state(state), state)
    assert back["param_groups"] == state["param_groups"]
    assert all(
        torch.equal(back["state"][at][key], value) for at, one in state["state"].items() for key, value in one.items()
    )
