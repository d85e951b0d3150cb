"""Hooks, zeroed rows and the switch file say the same; sets do not depend on order; foreign units are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memscan.errors import IntegrityError, ModelError
from memscan.mitigation.activations import ActivationStatistics, Moments, value_activations
from memscan.mitigation.patch import Patch
from memscan.mitigation.switches import read_switches, write_switches
from memscan.mitigation.units import BLOCKS, Layout, UnitSet, gated, switched_off, union, zeroed_rows

X, T, TEXT = torch.randn(3, 4, 8, 8), torch.tensor([3, 50, 99]), torch.randn(3, 7, 16) * 3


def run(unet: Any) -> torch.Tensor:
    return unet(X, T, encoder_hidden_states=TEXT, return_dict=False)[0]


def some_units(layout: Layout, step: int = 3) -> UnitSet:
    return UnitSet.of(layout.unit(flat) for flat in range(0, layout.count, step))


def test_layers_in_the_order_of_the_network(unet: Any) -> None:
    published, every = Layout.of(unet), Layout.of(unet, BLOCKS)
    assert published.sizes == (8, 16, 16)
    assert [name.split(".")[0] for name in published.names] == ["down_blocks", "down_blocks", "mid_block"]
    assert every.names[:3] == published.names
    assert every.sizes == (8, 16, 16, 16, 16)
    assert [every.unit(flat) for flat in (0, 8, 71)] == [
        (every.names[0], 0),
        (every.names[1], 0),
        (every.names[4], 15),
    ]


def test_hooks_equal_zeroed_rows(unet: Any) -> None:
    layout = Layout.of(unet, BLOCKS)
    units = some_units(layout)
    before = run(unet)
    with switched_off(unet, layout, units):
        hooked = run(unet)
    assert torch.equal(run(unet), before)  # the hooks are gone
    patch = Patch.between(dict(unet.named_parameters()), zeroed_rows(unet, units))
    patch.apply(unet)
    assert torch.allclose(run(unet), hooked, atol=1e-6)  # a product with 0 against a sum of zeros
    assert not torch.allclose(hooked, before, atol=1e-3)
    patch.revert(unet)
    assert torch.equal(run(unet), before)


def test_a_gate_of_its_own_for_each_row(unet: Any) -> None:
    layout = Layout.of(unet)
    units = some_units(layout, 2)
    masks = torch.stack([torch.ones(layout.count), layout.mask(units), torch.ones(layout.count)])
    with gated(unet, layout, masks):
        mixed = run(unet)
    with switched_off(unet, layout, units):
        off = run(unet)
    plain = run(unet)
    assert torch.allclose(mixed[0], plain[0], atol=1e-6)
    assert torch.allclose(mixed[1], off[1], atol=1e-6)
    assert torch.allclose(mixed[2], plain[2], atol=1e-6)


def test_sets(unet: Any) -> None:
    a, b = UnitSet.of([("x", 2), ("x", 1)]), UnitSet.of([("y", 0), ("x", 1)])
    assert UnitSet.from_json(json.loads(json.dumps(a.to_json()))) == a
    assert union([a, b]) == union([b, a]) == (a | b)
    assert len(a | b) == 3
    assert list(a - b) == [("x", 2)]
    assert union([]) == UnitSet()


def test_units_of_another_model_are_refused(unet: Any) -> None:
    layout = Layout.of(unet)
    for unit in (("down_blocks.7.attn2.to_v", 0), (layout.names[0], 8)):
        with pytest.raises(ModelError, match="belong to another model"):
            layout.mask(UnitSet.of([unit]))
        with pytest.raises(ModelError, match="belong to another model"):
            zeroed_rows(unet, UnitSet.of([unit]))


def test_activations_are_what_the_layer_gives(unet: Any) -> None:
    layout = Layout.of(unet)
    found = value_activations(unet, layout, TEXT)
    name = layout.names[1]
    weight = unet.get_submodule(name).weight
    slow = torch.stack([(weight @ token).abs() for token in TEXT[2]]).mean(dim=0)
    assert torch.allclose(found[2, 8:24], slow, atol=1e-5)


def test_statistics_do_not_depend_on_the_cut() -> None:
    values = torch.randn(100, 5) * 3 + 7
    whole = ActivationStatistics.join([Moments.of(values)])
    parts = ActivationStatistics.join([Moments.of(values[at : at + 13]) for at in range(0, 100, 13)])
    assert whole.count == parts.count == 100
    assert torch.allclose(whole.mean_U, values.mean(dim=0), atol=1e-5)
    assert torch.allclose(whole.spread_U, values.std(dim=0, correction=0), atol=1e-4)
    assert torch.allclose(whole.spread_U, parts.spread_U, atol=1e-5)
    with pytest.raises(ValueError, match="no spread"):
        ActivationStatistics.join([Moments.of(values[:1])])


def test_switch_file(tmp_path: Path) -> None:
    path = str(tmp_path / "switches.json")
    groups = {"c0": UnitSet.of([("x", 1)])}
    write_switches(path, groups, {"p1": "c0"})
    assert read_switches(path) == (groups, {"p1": "c0"})
    with pytest.raises(ValueError, match="unknown groups"):
        write_switches(path, groups, {"p1": "c1"})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ModelError, match="not a switch file"):
        read_switches(str(tmp_path / "other.json"))


def test_patch_file(tmp_path: Path, unet: Any) -> None:
    original = {name: tensor.clone() for name, tensor in unet.named_parameters()}
    changed = zeroed_rows(unet, some_units(Layout.of(unet), 5))
    patch = Patch.between(original, {**changed, "conv_in.weight": original["conv_in.weight"]})
    assert set(patch.new) == set(changed)  # what is equal is no change
    assert patch.changed_weights == 8 * 16
    patch.save(str(tmp_path / "p.safetensors"), {"for": "test"})
    again = Patch.load(str(tmp_path / "p.safetensors"))
    again.apply(unet)
    with pytest.raises(IntegrityError, match="does not have the values that the patch expects"):
        again.apply(unet)
    again.revert(unet)
    assert all(torch.equal(original[name], tensor) for name, tensor in unet.named_parameters())
    (tmp_path / "broken").write_bytes(b"no patch")
    with pytest.raises(ModelError, match="cannot be read as a patch"):
        Patch.load(str(tmp_path / "broken"))
    with pytest.raises(ModelError, match="another architecture"):
        Patch.between(original, {"no.such": torch.zeros(1)})
