"""A tiny world in the real formats: random weights, 64-pixel images, but every adapter and stage is the real one.

The references hold, besides random images, the very images that the checkpoint makes of two captions: those captions
are memorised by construction, and a scan must say so and name them.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from memscan.config import CensusConfig, parse_config
from memscan.records import prompt_id, sample_seed

SIDE = 64
SETTINGS = "settings.json"
NEMO_C: dict[str, Any] = {
    "method": "nemo_c",
    "scope": "cluster",
    "blocks": ("down_blocks", "mid_block", "up_blocks"),
    "steps": 10,
    "seeds": 3,
    "threshold_prompts": 4,
    "paraphrases": 1,
    "embeddings": 1,
    "extend": 0.9,
}
SAMPLES = 2
MEMORISED = ("a red lighthouse on a cliff", "two cats in a basket")
ORDINARY = tuple(f"an ordinary caption number {number}" for number in range(10))


@dataclass(frozen=True)
class TinyWorld:
    """Paths of the world, and a configuration over it as a mapping."""

    folder: Path
    settings: dict

    def config(self, out: Path, **changes: object) -> CensusConfig:
        """The census into `out`; `changes` are dotted keys with "__" for the dot."""
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return parse_config({**self.settings, "out": str(out)}, overrides)

    def write_yaml(self, path: Path, out: Path) -> Path:
        path.write_text(yaml.safe_dump({**self.settings, "out": str(out)}))
        return path


def make_world(folder: Path) -> TinyWorld:
    """The world in an empty folder."""
    save_checkpoint(folder / "checkpoint")
    save_segmenter(folder / "segmenter.onnx")
    save_embedder(folder / "embedder.pt")
    settings = {
        "name": "tiny",
        "prompts": {"paths": [str(folder / "prompts.csv")]},
        "generator": {
            "path": str(folder / "checkpoint"),
            "steps": 2,
            "samples": SAMPLES,
            "batch_size": 4,
            "sanity": "off",  # random weights do not denoise
        },
        "segmenter": {"path": str(folder / "segmenter.onnx"), "size": 32},
        "embedder": {
            "path": str(folder / "embedder.pt"),
            "sha256": hashlib.sha256((folder / "embedder.pt").read_bytes()).hexdigest(),
            "name": "tiny",
            "resize": "square",
            "size": 32,
        },
        "index": {"source": str(folder / "references.parquet"), "top_k": 2},
        "metric": {"canvas": 176},
        "resources": {"device": "cpu", "prompts_per_block": 4, "samplers": 1},
    }
    # A duplicate, an empty and an endless caption and a Latin-1 byte: 12 prompts and 3 rejects of 16 input rows.
    rows = ["caption", *MEMORISED, *ORDINARY, ORDINARY[0], '""', "x" * 100_000]
    (folder / "prompts.csv").write_bytes("\n".join(rows).encode() + b"\ncaf\xe9 terrace\n")
    save_references(folder / "references.parquet", parse_config({**settings, "out": "unused"}))
    (folder / SETTINGS).write_text(json.dumps(settings))
    return open_world(folder)


def open_world(folder: Path) -> TinyWorld:
    """The world that is in a folder."""
    return TinyWorld(folder, json.loads((folder / SETTINGS).read_text()))


def save_checkpoint(folder: Path) -> None:
    """A StableDiffusionPipeline folder with random weights: 8x VAE, 64-pixel images, 16 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def save_tokenizer(folder: Path):
    """A CLIP tokenizer whose vocabulary is single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=16)


def save_segmenter(path: Path) -> None:
    """An ONNX file in birefnet-general's format: bright is foreground."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "gain"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, 32, 32])],
        [numpy_helper.from_array(np.array(4.0, dtype=np.float32), "gain")],
    )
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))


def save_embedder(path: Path) -> None:
    """A TorchScript file that maps an image to 48 numbers."""
    import torch

    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 48))
    torch.jit.trace(network.eval(), torch.zeros(1, 3, 32, 32)).save(str(path))


def save_references(path: Path, config: CensusConfig) -> None:
    """Random images, one truncated file, and what the checkpoint makes of the memorised captions."""
    from memscan.models.generator import Generator

    random = np.random.default_rng(0)
    rows = [
        {
            "reference_id": f"random-{number}",
            "caption": f"noise of kind {number}" if number % 2 else None,
            "url": None,
            "image": png(random_image(random)),
        }
        for number in range(20)
    ]
    whole = png(random_image(random))
    rows.append({"reference_id": "truncated", "caption": "cut off", "url": None, "image": whole[: len(whole) // 2]})
    generator = Generator.load(config.generator)
    for caption in MEMORISED:
        seeds = [sample_seed(prompt_id(caption), sample) for sample in range(SAMPLES)]
        for sample, image in enumerate(generator.generate([caption] * SAMPLES, seeds).images_BHWC):
            name = f"copy-{caption[:5]}-{sample}"
            rows.append({"reference_id": name, "caption": caption, "url": f"https://x/{sample}", "image": png(image)})
    schema = pa.schema([(name, pa.string()) for name in ("reference_id", "caption", "url")] + [("image", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def random_image(random: np.random.Generator) -> np.ndarray:
    coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()
