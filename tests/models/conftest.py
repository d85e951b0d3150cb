"""A tiny Stable Diffusion folder with random weights: 64x64 images, 8x8 latents of 32 channels, 32 tokens."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memscan.config import GeneratorConfig
from memscan.models.checkpoint import Checkpoint
from memscan.models.generator import Generator

MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "d o", "do g</w>")


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def write_tokenizer(folder: Path, max_length: int = 32) -> None:
    """CLIP's byte-level vocabulary with a few merges, as vocab.json and merges.txt."""
    folder.mkdir(parents=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    words = [merge.replace(" ", "") for merge in MERGES]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    end = "<|endoftext|>"
    settings = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    settings |= {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}  # type: ignore[dict-item]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build_pipeline(folder: Path, prediction_type: str) -> Any:
    """The stock pipeline with random weights that are large enough for captions and seeds to matter."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    write_tokenizer(folder / "written_tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "written_tokenizer"))
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_factor=20.0,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=32,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=0.7,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.5)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved checkpoints by prediction type, weights in float16 as the planted world ships them. Not to be changed."""
    folders = {}
    for prediction_type in ("epsilon", "v_prediction"):
        root = tmp_path_factory.mktemp(prediction_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of outdated scheduler settings, which are the point
            pipeline = build_pipeline(root, prediction_type).to(torch.float16)
        pipeline.save_pretrained(root / "checkpoint", safe_serialization=True)
        folders[prediction_type] = root / "checkpoint"
    return folders


@pytest.fixture(scope="session")
def make_generator(checkpoints: dict[str, Path]) -> Callable[..., Generator]:
    """Generators over the tiny checkpoints, each loaded once: `make_generator(prediction_type, **config)`."""
    loaded: dict[str, Checkpoint] = {}

    def make(prediction_type: str = "epsilon", hooks: Any = None, **settings: Any) -> Generator:
        defaults: dict[str, Any] = {"steps": 4, "guidance": 5.0, "batch_size": 4}
        config = GeneratorConfig(path=str(checkpoints[prediction_type]), **(defaults | settings))
        if prediction_type not in loaded:
            loaded[prediction_type] = Generator.load(config).checkpoint
        return Generator(loaded[prediction_type], config, hooks)

    return make


@pytest.fixture
def natural_image() -> Callable[..., np.ndarray]:
    """Smooth random RGB images with detail, uint8 (H, W, 3)."""

    def make(seed: int, height: int, width: int) -> np.ndarray:
        from PIL import Image

        small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))

    return make
