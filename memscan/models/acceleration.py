"""This module sets how fast a checkpoint runs.

It holds everything that changes speed and rounding, and nothing else.

None of it is part of a run's identity. On a CPU everything is off by default, so that results are bit-equal to those of
the stock pipeline. On a GPU, what costs no start-up time is on, and compiling is on only if `resources.compile` says
so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from memscan.config import ResourcesConfig
from memscan.models.graphs import Graphed
from memscan.models.unet import SplitUNet, why_not

Compile = Literal["off", "inductor", "graphs"]


@dataclass(frozen=True)
class Acceleration:
    """This says what is done to a checkpoint's networks for speed.

    Args:
        share: rows of a guided batch share what comes before the first cross-attention (exact; `unet.SplitUNet`).
        fuse: query, key and value projections are one matrix product.
        channels_last: memory format of the denoiser and the VAE.
        compile: "inductor" compiles the denoiser and the VAE's decoder for one shape, "graphs" records the denoiser's
            kernels as CUDA graphs.
        probe: the images of a batch are as many as fit the GPU's memory instead of `generator.batch_size`.
    """

    share: bool = False
    fuse: bool = False
    channels_last: bool = False
    compile: Compile = "off"
    probe: bool = False

    @classmethod
    def of(cls, resources: ResourcesConfig, device: torch.device) -> Acceleration:
        """Return what a configuration asks for on a device."""
        fast = resources.fast == "on" or (resources.fast == "auto" and device.type == "cuda")
        return cls(
            share=fast,
            fuse=fast,
            channels_last=fast and device.type == "cuda",  # on a CPU it gains nothing (measured)
            compile=resources.compile,
            probe=resources.probe_batch and device.type == "cuda",
        )


def accelerate(unet: Any, acceleration: Acceleration, *, rows: int, interval: int = 1) -> Any:
    """Return the denoiser as the sampling loop calls it; it is the network itself if nothing is asked for.

    A network that `SplitUNet` does not know is only fused. The network's weights are shared, not copied, except that
    fusing keeps a second copy of the projections.

    Args:
        rows: images of a full batch; compiled code pads smaller ones to it.
        interval: feature caching, `generator.cache_interval`.

    Raises:
        ValueError: feature caching is requested, and the network is not one on which it works.
    """
    if acceleration.fuse and not getattr(unet, "original_attn_processors", None):
        unet.fuse_qkv_projections()
    compiled = acceleration.compile != "off"
    if not (acceleration.share or compiled or interval > 1):
        return unet
    reason = why_not(unet)
    if reason and interval > 1:
        raise ValueError(f"{reason}: feature caching is not known there")
    if reason:
        return unet
    split = SplitUNet(unet, rows=rows if compiled else None, interval=interval)
    if acceleration.compile == "inductor":
        split.full, split.shallow = compile_function(split.full), compile_function(split.shallow)
    elif acceleration.compile == "graphs" and interval == 1:
        split.full = Graphed(split.full)
    return split


def compile_function(function: Any) -> Any:
    """Compile a function for the shapes with which it is called.

    The shapes are few, so each gets kernels of its own.
    """
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs" if _has_gpu() else None)


def _has_gpu() -> bool:
    return torch.cuda.is_available()
