"""A repaired folder keeps every part and precision of its original, and taking the change back gives the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memscan.errors import ModelError
from memscan.mitigation.folder import load_original_unet
from memscan.mitigation.patch import Patch, patch_folder
from memscan.planted.world import shipped_world

FILE = "diffusion_pytorch_model"


def single(unet: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, unet / f"{FILE}.safetensors", metadata={"format": "pt", "made by": "somebody"})


def with_fp16(unet: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As the hub has it: float32, and float16 beside it, whose name comes first."""
    save_file({name: tensor.float() + 1e-5 for name, tensor in tensors.items()}, unet / f"{FILE}.safetensors")
    halves = {name: (tensor.float() + 1e-5).half() for name, tensor in tensors.items()}
    save_file(halves, unet / f"{FILE}.fp16.safetensors", metadata={"format": "pt"})


def fp16_alone(unet: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, unet / f"{FILE}.fp16.safetensors", metadata={"format": "pt"})


def sharded(unet: Path, tensors: dict[str, torch.Tensor], variant: str = "") -> None:
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    files = [f"{FILE}-0000{number}-of-00002{variant}.safetensors" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, unet / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = unet / f"{FILE}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def sharded_fp16(unet: Path, tensors: dict[str, torch.Tensor]) -> None:
    sharded(unet, tensors, ".fp16")


def bfloat16(unet: Path, tensors: dict[str, torch.Tensor]) -> None:
    single(unet, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(shipped_world() / "checkpoint" / "unet" / f"{FILE}.safetensors")


@pytest.mark.parametrize("layout", [single, with_fp16, fp16_alone, sharded, sharded_fp16, bfloat16])
def test_revert_gives_the_originals_bytes(
    tmp_path: Path, weights: dict[str, torch.Tensor], layout: Callable[[Path, dict[str, torch.Tensor]], None]
) -> None:
    original = tmp_path / "original"
    shutil.copytree(shipped_world() / "checkpoint", original)
    index = json.loads((original / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (original / "model_index.json").write_text(json.dumps(index))
    (original / "safety_checker").mkdir()
    (original / "safety_checker" / "model.safetensors").write_bytes(b"as it is")
    unet = original / "unet"
    (unet / f"{FILE}.safetensors").unlink()
    layout(unet, weights)

    before = dict(load_original_unet(original).named_parameters())
    name = "mid_block.resnets.0.conv1.weight"
    patch = Patch.between(before, {name: torch.zeros_like(before[name])})
    patch_folder(original, patch, tmp_path / "repaired")
    patch_folder(tmp_path / "repaired", patch, tmp_path / "reverted", reverse=True)

    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    for made in ("repaired", "reverted"):
        assert sorted(p.relative_to(tmp_path / made) for p in (tmp_path / made).rglob("*") if p.is_file()) == files
    changed = [file for file in files if (tmp_path / "repaired" / file).read_bytes() != (original / file).read_bytes()]
    assert changed
    assert all(file.parts[0] == "unet" and file.suffix == ".safetensors" for file in changed)
    for file in files:
        assert (tmp_path / "reverted" / file).read_bytes() == (original / file).read_bytes(), file
    kinds = set()
    for file in (tmp_path / "repaired" / "unet").glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 (no mapping)
                kinds.add(opened.get_tensor(name).dtype)
                assert not opened.get_tensor(name).any()
    assert kinds == ({torch.float32, torch.float16} if layout is with_fp16 else {before[name].dtype})


def test_weights_in_other_formats_are_not_copied(tmp_path: Path) -> None:
    """They would be the old ones beside the repaired."""
    original = tmp_path / "original"
    shutil.copytree(shipped_world() / "checkpoint", original)
    (original / "unet" / f"{FILE}.bin").write_bytes(b"old weights")
    (original / "v1-5-pruned.safetensors").write_bytes(b"old weights")
    before = dict(load_original_unet(shipped_world() / "checkpoint").named_parameters())
    name = "mid_block.resnets.0.conv1.weight"
    patch_folder(original, Patch.between(before, {name: torch.zeros_like(before[name])}), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert not (tmp_path / "out" / "v1-5-pruned.safetensors").exists()


def test_several_unknown_variants_are_named(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    original = tmp_path / "original"
    shutil.copytree(shipped_world() / "checkpoint", original)
    unet = original / "unet"
    (unet / f"{FILE}.safetensors").rename(unet / f"{FILE}.ema.safetensors")
    load_original_unet(original)
    save_file(weights, unet / f"{FILE}.mine.safetensors")
    with pytest.raises(ModelError, match="variants ema, mine only"):
        load_original_unet(original)
