"""What a watch of another kind finds: trained parts, LoRAs and single files, each scanned on the panel's base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memscan.census.policy import NightlyConfig, SourceConfig
from memscan.config import GeneratorConfig, LoraConfig
from memscan.errors import ConfigError
from pipelines.nightly.registry import find, strangers


def test_trained_parts_and_loras_are_scanned_on_the_base(tmp_path: Path) -> None:
    (tmp_path / "whole" / "unet").mkdir(parents=True)
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    (tmp_path / "whole" / "unet" / "model.safetensors").write_text("w")
    for part in ("step-5/unet", "step-5/unet_ema", "step-10/unet"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "config.json").write_text("{}")
        (tmp_path / part / "diffusion_pytorch_model.safetensors").write_text("w")
    (tmp_path / "style.safetensors").write_text("w")
    panel = GeneratorConfig(path="watched", base="sd15", steps=7)

    source = SourceConfig(path=str(tmp_path), kind="part", match="*/unet")
    first, second = find([source])
    assert (first.name, second.name) == ("step-5/unet", "step-10/unet")
    assert first.generator(panel) == GeneratorConfig(path=f"{tmp_path}/step-5/unet", base="sd15", steps=7)
    strange = strangers([SourceConfig(path=str(tmp_path), kind="part")])
    assert sorted(one.name for one in strange) == ["style.safetensors", "whole"]

    (lora,) = find([SourceConfig(path=str(tmp_path), kind="lora")])
    fused = LoraConfig(path=f"{tmp_path}/style.safetensors")
    assert lora.generator(panel) == GeneratorConfig(path="sd15", steps=7, loras=[fused])
    (single,) = find([SourceConfig(path=str(tmp_path), kind="file")])
    assert single.generator(panel) == GeneratorConfig(path=f"{tmp_path}/style.safetensors", base="sd15", steps=7)
    names = sorted(one.name for one in strangers([SourceConfig(path=str(tmp_path), kind="lora")]))
    assert names == ["step-10", "step-5", "whole"]

    every = [SourceConfig(path=str(tmp_path), kind=kind) for kind in ("checkpoint", "part", "lora")]
    assert not strangers(every)

    shutil.copytree(tmp_path / "step-10" / "unet", tmp_path / "step-10" / "text_encoder")  # DreamBooth's, of both
    both = find([SourceConfig(path=str(tmp_path), kind="part", match="step-10*")])
    assert [one.name for one in both] == ["step-10"]
    assert "step-10" not in [one.name for one in strangers([SourceConfig(path=str(tmp_path), kind="part")])]

    with pytest.raises(ValueError, match="needs a path"):
        SourceConfig(hub="a/b", kind="lora")


def test_a_base_is_needed_for_what_is_no_whole_checkpoint(tmp_path: Path) -> None:
    panel = {
        "prompts": {"paths": ["p.csv"]},
        "segmenter": {"path": "s.onnx"},
        "embedder": {"path": "e.pt"},
        "index": {"source": "refs"},
    }
    settings = {"out": "o", "watch": [{"path": str(tmp_path), "kind": "lora"}]}
    with pytest.raises(ConfigError, match=r"generator\.base: is missing"):
        NightlyConfig.model_validate({**settings, "census": panel}).panel()
    based = {**panel, "generator": {"base": "sd15"}}
    assert NightlyConfig.model_validate({**settings, "census": based}).panel().generator.base == "sd15"
