"""Textual inversions and clip skip: as the stock pipeline has them, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memscan.config import GeneratorConfig, InversionConfig
from memscan.errors import ConfigError, MemscanError, ModelError
from memscan.models.generator import Generator
from memscan.models.stock import StockGenerator
from memscan.planted.world import shipped_world, world_config
from pipelines.run_folder.inputs import generator_id

CHECKPOINT = shipped_world() / "checkpoint"
CAPTION = "a red cup of <gold> on a table"


def config(*inversions: InversionConfig, **settings: Any) -> GeneratorConfig:
    rule = {"path": str(CHECKPOINT), "steps": 2, "guidance": 2.0, **settings}
    return GeneratorConfig(**rule, textual_inversions=list(inversions))


def word(folder: Path, name: str = "<gold>", rows: int = 2, width: int = 96, file: str = "gold.safetensors") -> str:
    vectors = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    save_file({name: vectors if rows > 1 else vectors[0]}, folder / file)
    return str(folder / file)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_captions_are_encoded_as_by_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, clip_skip: int | None
) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    file = word(tmp_path, rows=rows)
    made = Generator.load(config(InversionConfig(path=file), clip_skip=clip_skip))
    stock = StableDiffusionPipeline.from_pretrained(str(CHECKPOINT), safety_checker=None, dtype=torch.float32)
    stock.load_textual_inversion(str(tmp_path), weight_name="gold.safetensors", token="<gold>")
    if not hasattr(stock.text_encoder, "text_model"):  # diffusers 0.42 still asks for it when layers are skipped
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    expected, empty = stock.encode_prompt(CAPTION, "cpu", 1, True, clip_skip=clip_skip)
    torch.testing.assert_close(made.text_encoder([CAPTION]).hidden_NTD, expected, atol=1e-5, rtol=1e-5)
    negative = made.empty_text()
    assert negative is not None
    torch.testing.assert_close(negative.hidden_NTD, empty, atol=1e-5, rtol=1e-5)
    plain = Generator.load(config()).text_encoder([CAPTION]).hidden_NTD
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_both_adapters_give_the_same_images(tmp_path: Path) -> None:
    inversion = InversionConfig(path=word(tmp_path))
    own = Generator.load(config(inversion)).generate([CAPTION], [3]).images_BHWC
    stock = StockGenerator.load(config(inversion, adapter="stock", scheduler="DDIMScheduler"))
    assert np.abs(own.astype(int) - stock.generate([CAPTION], [3]).images_BHWC).max() <= 1


def test_they_are_part_of_the_models_name_and_of_nothing_else(tmp_path: Path) -> None:
    file = word(tmp_path)
    rules = [config(), config(InversionConfig(path=file)), config(InversionConfig(path=file, token="<silver>"))]
    assert len({generator_id(rule) for rule in rules}) == 3
    made = [Generator.load(rule).spec for rule in (*rules[:2], config(clip_skip=1))]
    assert len({spec.sha256 for spec in made}) == 2
    assert made[2].preprocessing.endswith("-clipskip1")
    content = world_config().content()["generator"]
    assert "clip_skip" not in content
    assert "textual_inversions" not in content


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    narrow = word(tmp_path, width=48, file="narrow.safetensors")
    known = word(tmp_path, name="red</w>", file="known.safetensors")
    save_file({"clip_l": torch.zeros(1, 96), "clip_g": torch.zeros(1, 128)}, tmp_path / "xl.safetensors")
    save_file({"a": torch.zeros(1, 96), "b": torch.zeros(1, 96)}, tmp_path / "lora.safetensors")
    (tmp_path / "pickle.pt").write_bytes(b"PK")
    lines = {
        narrow: "its vectors have 48 values, those of text_encoder 96",
        known: "is in the tokenizer already",
        str(tmp_path / "xl.safetensors"): "has vectors for text_encoder and text_encoder_2",
        str(tmp_path / "lora.safetensors"): "not a textual inversion: it has 2 tensors",
        str(tmp_path / "pickle.pt"): "no safetensors file",
        str(tmp_path / "none"): "no such file or folder",
    }
    for path, line in lines.items():
        with pytest.raises(ModelError, match=line):
            Generator.load(config(InversionConfig(path=path)))
    with pytest.raises(ConfigError, match=r"generator\.clip_skip: skips all of the text encoder's 2 layers"):
        Generator.load(config(clip_skip=9)).generate([CAPTION], [1])


@pytest.mark.parametrize("key", ["prompt_weighting", "long_prompts", "vae", "lora", "embeddings", "controlnet"])
def test_keys_of_other_tools_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"generator\.{key} is not a key of memscan: "):
        GeneratorConfig(path="x", **{key: True})


def test_a_pipeline_that_takes_neither_says_so(tmp_path: Path) -> None:
    from tests.support.stock_models import save_pixart

    folder = str(save_pixart(tmp_path / "pixart"))
    for settings, line in (
        ({"clip_skip": 1}, r"generator\.clip_skip: is not taken by PixArtSigmaPipeline"),
        (
            {"textual_inversions": [InversionConfig(path=word(tmp_path))]},
            r"generator\.textual_inversions: are not taken by PixArtSigmaPipeline",
        ),
    ):
        with pytest.raises(MemscanError, match=line):
            StockGenerator.load(GeneratorConfig(path=folder, steps=2, **settings))
