"""Pipelines whose captions are read by a language model: guidance reaches each one under its own name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memscan.config import GeneratorConfig
from memscan.models.stock import StockGenerator
from tests.support.more_stock_models import save_chroma, save_lumina, save_qwen, save_sana
from tests.support.stock_models import SIDE

CAPTIONS, SEEDS = ["a red cup", "two dogs"], [11, 7]
# What each pipeline is to be called with for guidance 7, and what it makes of captions by itself.
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    # A blank is the negative caption of Qwen-Image's own examples; without one there is no guidance.
    "qwen": (save_qwen, {"true_cfg_scale": 7.0, "negative_prompt": [" ", " "]}),
    "lumina": (save_lumina, {"guidance_scale": 7.0}),
    "sana": (save_sana, {"guidance_scale": 7.0, "use_resolution_binning": False, "clean_caption": False}),
    "chroma": (save_chroma, {"guidance_scale": 7.0}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_applied_as_by_the_stock_pipeline(tmp_path: Path, kind: str) -> None:
    from diffusers import DiffusionPipeline

    save, arguments = KINDS[kind]
    folder = save(tmp_path / kind)
    sizes = {"height": SIDE, "width": SIDE}
    rule = GeneratorConfig(path=str(folder), steps=2, guidance=7.0, batch_size=2, **sizes)
    made = StockGenerator.load(rule).generate(CAPTIONS, SEEDS)
    assert made.finite_B.all()
    plain = StockGenerator.load(rule.model_copy(update={"guidance": 1.0})).generate(CAPTIONS, SEEDS)
    # Measured: 12 to 32 levels of 255 on average; where guidance is not applied they are equal.
    assert np.abs(made.images_BHWC.astype(int) - plain.images_BHWC).mean() > 2

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipeline(prompt=CAPTIONS, generator=random, num_inference_steps=2, **sizes, **arguments).images
    assert np.abs(np.stack([np.asarray(image) for image in images]).astype(int) - made.images_BHWC).max() <= 1
