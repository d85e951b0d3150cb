"""Patches that are not whole: refused before anything is written, whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memscan.errors import IntegrityError, ModelError
from memscan.mitigation.patch import FORMAT, Patch

NAME = "weight"


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def patch_file(path: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> str:
    """A patch of the weight, with something done to its tensors."""
    before = dict(network().named_parameters())
    Patch.between(before, {NAME: before[NAME].detach() + 1}).save(str(path))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": FORMAT})
    return str(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("old.weight"), "weight is there after the change only"),
        (lambda tensors: tensors.pop("new.weight"), "weight is there before the change only"),
        (lambda tensors: tensors.clear(), "it changes nothing"),
        (lambda tensors: tensors.update({"new.weight": torch.ones(1)}), "another shape or precision"),
        (lambda tensors: tensors.update({"new.weight": torch.ones(2, 3).half()}), "another shape or precision"),
        (lambda tensors: tensors.update({"new.weight": torch.full((2, 3), torch.nan)}), "not finite"),
        (lambda tensors: tensors.update({"weight": torch.ones(2, 3)}), "neither old nor new"),
    ],
)
def test_a_patch_that_is_not_whole_is_refused(tmp_path: Path, change: Callable[..., object], said: str) -> None:
    with pytest.raises(ModelError, match=f"is not a complete patch .*{said}"):
        Patch.load(patch_file(tmp_path / "p.safetensors", change))


def test_what_is_applied_by_hand_is_looked_at_too() -> None:
    unet = network()
    before = unet.weight.detach().clone()
    for new in ({NAME: torch.ones(1)}, {NAME: torch.full((2, 3), torch.inf)}, {}, {NAME: before + 1, "other": before}):
        with pytest.raises(ModelError):
            Patch({NAME: before}, new).apply(unet)
        assert torch.equal(unet.weight, before)


def test_a_name_that_the_network_has_not_changes_nothing(tmp_path: Path) -> None:
    def renamed(tensors: dict[str, Tensor]) -> None:
        for side in ("old", "new"):
            tensors[f"{side}.other"] = torch.ones(2)

    unet = network()
    before = unet.weight.detach().clone()
    with pytest.raises((ModelError, IntegrityError), match="other"):
        Patch.load(patch_file(tmp_path / "p.safetensors", renamed)).apply(unet)
    assert torch.equal(unet.weight, before)
