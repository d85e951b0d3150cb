"""What each part of `gpu_quick` must compute and move, and hold, counted on networks without values.

A row is one unit of a part's work at the sizes that the part runs; its least time is for the peaks of an H200
(`_roofline.H200`), so that a first measurement can be judged against a prediction.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._roofline import H200, Peaks, Work, work_of
from benchmarks.published import EmbedderSized, SegmenterSized, build_flow_pipeline, build_pipeline
from memscan.models.unet import SplitUNet, call_options, why_not

_HALF = torch.bfloat16


def predictions(peaks: Peaks = H200) -> dict[str, dict[str, float]]:
    """Count every row of `PREDICTED`: tflop, gigabytes, kernels, seconds, and gib held by weights and one operation."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: make(Path(folder)).to_json(peaks) for name, make in PREDICTED.items()}


class Held(Work):
    """The work of a call and the memory that it needs: the weights, and the largest operation's tensors."""

    def __init__(self, work: Work, weights: int) -> None:
        super().__init__(work.flops, work.moved, work.kernels, work.operations, work.reads, work.copied)
        self.weights = weights

    def times(self, count: int) -> Held:
        """The same call so many times."""
        one = Work(self.flops * count, self.moved * count, self.kernels * count, self.operations * count)
        return Held(one, self.weights)

    def and_then(self, other: Held) -> Held:
        """One call after another, with the weights of both."""
        both = Work(self.flops + other.flops, self.moved + other.moved, self.kernels + other.kernels)
        both.operations = self.operations + other.operations
        return Held(both, self.weights + other.weights)

    def to_json(self, peaks: Peaks) -> dict[str, float]:
        largest = max((moved for _, moved in self.operations), default=0.0)
        return {**super().to_json(peaks), "gib": (self.weights + largest) / 2**30}


def _unet_step(name: str, batch: int, folder: Path, *, shared: bool) -> Held:
    pipeline = build_pipeline(name, folder, device="meta", dtype=_HALF)
    unet, config = pipeline.unet, pipeline.unet.config
    with torch.device("meta"):
        x = torch.zeros(2 * batch, config.in_channels, config.sample_size, config.sample_size, dtype=_HALF)
        text = torch.zeros(2 * batch, pipeline.tokenizer.model_max_length, config.cross_attention_dim, dtype=_HALF)
        added = None
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {
                "text_embeds": torch.zeros(2 * batch, width, dtype=_HALF),
                "time_ids": torch.zeros(2 * batch, 6, dtype=_HALF),
            }
        timestep = torch.tensor(1)
    network: Any = SplitUNet(unet) if shared and why_not(unet) is None else unet
    more = call_options(network, 2, 0)
    return Held(work_of(lambda: network(x, timestep, text, added_cond_kwargs=added, **more)), _weights(unet))


def _decoding(name: str, batch: int, folder: Path) -> Held:
    pipeline = build_pipeline(name, folder, device="meta", dtype=_HALF)
    side = pipeline.unet.config.sample_size
    latents = torch.zeros(batch, 4, side, side, dtype=_HALF, device="meta")
    return Held(work_of(lambda: pipeline.vae.decode(latents)), _weights(pipeline.vae))


def _flow_step(batch: int, folder: Path) -> Held:
    pipeline = build_flow_pipeline("sd3", folder, device="meta", dtype=_HALF)
    transformer = pipeline.transformer
    with torch.device("meta"):
        x = torch.zeros(2 * batch, 16, 128, 128, dtype=_HALF)
        # 77 tokens of CLIP and 256 of the T5 that is left out: zeros, which cost the same
        text, pooled = torch.zeros(2 * batch, 333, 4096, dtype=_HALF), torch.zeros(2 * batch, 2048, dtype=_HALF)
        timestep = torch.zeros(2 * batch)
    call = work_of(lambda: transformer(x, text, pooled, timestep))
    return Held(call, _weights(transformer))


def _network(network: torch.nn.Module, side: int, batch: int) -> Held:
    images = torch.zeros(batch, 3, side, side, dtype=_HALF, device="meta")
    return Held(work_of(lambda: network.to(_HALF).eval()(images)), _weights(network))


def _segmenter(folder: Path) -> Held:
    with torch.device("meta"):
        return _network(SegmenterSized(), 1024, 8)


def _embedder(folder: Path) -> Held:
    with torch.device("meta"):
        return _network(EmbedderSized(), 288, 24)


def _image(name: str, batch: int, folder: Path) -> Held:
    """Fifty guided steps of a batch, with the branches shared, and its decoding."""
    step = _unet_step(name, batch, folder, shared=True)
    return step.times(50).and_then(_decoding(name, batch, folder))


def _weights(network: torch.nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in network.parameters())


PREDICTED: dict[str, Callable[[Path], Held]] = {
    "SD 1.x, a step of 16, stock": lambda folder: _unet_step("sd1", 16, folder, shared=False),
    "SD 1.x, a step of 16, shared": lambda folder: _unet_step("sd1", 16, folder, shared=True),
    "SD 1.x, decoding 16": lambda folder: _decoding("sd1", 16, folder),
    "SD 1.x, 16 images": lambda folder: _image("sd1", 16, folder),
    "SD 1.x, one image, stock": lambda folder: (
        _unet_step("sd1", 1, folder, shared=False).times(50).and_then(_decoding("sd1", 1, folder))
    ),
    "screen, one call of 64 prompts": lambda folder: _unet_step("sd1", 32, folder, shared=False),
    "segmenter at 1024, 8 images": _segmenter,
    "embedder at 288, 24 views": _embedder,
    "SD XL, 8 images": lambda folder: _image("xl", 8, folder),
    "SD3 medium, 28 steps of 8": lambda folder: _flow_step(8, folder).times(28),
}

# What the parts of `gpu_quick` run, in these units, with their warm-up: the batches of 16 (SD 1.x) or 8 images that are
# sampled stock, by our loop and, for `sd1`, with CUDA graphs. The parts that are left out run the planted networks,
# which are bound by launches, or no network.
PART_UNITS: dict[str, dict[str, float]] = {
    "sd1": {"SD 1.x, one image, stock": 4, "SD 1.x, 16 images": 2 + 3 + 3},
    "screen": {"screen, one call of 64 prompts": (1024 + 2 * 64) / 64},
    "chain": {
        "SD 1.x, 16 images": 5 * 4,
        "SD 1.x, one image, stock": 1,
        "segmenter at 1024, 8 images": (100 + 4 * 64) / 8,
        "embedder at 288, 24 views": (100 + 4 * 64) / 8,
    },
    "xl": {"SD XL, 8 images": 2 / 8 + 2 + 3},
    "flow": {"SD3 medium, 28 steps of 8": 2 / 8 + 3},
    "inductor": {"SD 1.x, one image, stock": 1, "SD 1.x, 16 images": 2 + 3},
}


def part_seconds(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the least seconds of whole parts, from what `predictions` gave."""
    return {
        part: sum(count * found[unit]["seconds"] for unit, count in units.items()) for part, units in PART_UNITS.items()
    }
