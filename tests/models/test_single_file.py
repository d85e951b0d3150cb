"""Single files of the original code, written from diffusers' parts by the inverse of its converters' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from memscan.config import GeneratorConfig
from memscan.errors import MemscanError
from memscan.models.generator import Generator
from memscan.planted.world import shipped_world
from pipelines.run_folder.inputs import generator_id
from tests.support.original_layout import original

BASE = shipped_world() / "checkpoint"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The planted model as A1111 has it."""
    return original(BASE)


def config(file: Path, base: Path = BASE, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig(path=str(file), base=str(base), steps=2, guidance=2.0, **settings)


def written(folder: Path, tensors: Tensors, name: str = "dreamshaper_8.safetensors", **metadata: str) -> Path:
    save_file({key: one.contiguous() for key, one in tensors.items()}, folder / name, metadata=metadata or None)
    return folder / name


def test_a_single_file_is_the_model_that_it_was_made_of(tmp_path: Path, tensors: Tensors) -> None:
    made = Generator.load(config(written(tmp_path, tensors)))
    plain = Generator.load(GeneratorConfig(path=str(BASE), steps=2, guidance=2.0))
    for part in ("unet", "vae", "text_encoder"):
        want = getattr(plain.checkpoint, part).state_dict()
        for name, one in getattr(made.checkpoint, part).state_dict().items():
            assert torch.equal(one, want[name]), (part, name)
    captions, seeds = ["a red cup", "two boats"], [1, 2]
    assert np.array_equal(made.generate(captions, seeds).images_BHWC, plain.generate(captions, seeds).images_BHWC)
