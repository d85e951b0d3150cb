"""This module configures the resources that a run may use of the machines. None of these keys decides a result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memscan.config.base import Section

# `resources.probe_batch` finds no larger batch. Larger batches gain nothing on any GPU of today (full at 8 to 32) and
# make a block, the unit of retry, long.
PROBED_IMAGES = 32


class ResourcesConfig(Section):
    """This section says what Ray gives each stage. Defaults suit one machine; for clusters see docs/operations.md."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description='The models run on this device. With "auto" it is CUDA if there is a GPU.'
    )
    samplers: int | None = Field(
        None,
        ge=1,
        description="This number of actors generates images. If it is not given, there is one actor per GPU, or one "
        "per CPU core if there is no GPU.",
    )
    judges: int | None = Field(
        None,
        ge=1,
        description="This number of actors searches the index and compares with the metric. If it is not given, the "
        "actors that generate do this too.",
    )
    sampler_gpus: float = Field(
        1.0, gt=0, description="An actor that generates gets this number of GPUs, or this share of one GPU."
    )
    search: Literal["resident", "scatter"] = Field(
        "resident",
        description='"resident" keeps the whole index on every node. "scatter" gives each shard an actor of its own, '
        "for an index that is larger than a node's disk.",
    )
    prompts_per_block: int = Field(
        16,
        ge=1,
        description="One task handles this number of prompts, which is the unit of retry. On GPUs a block has at "
        "least eight batches of the sampling.",
    )
    fast: Literal["auto", "on", "off"] = Field(
        "auto",
        description="This key says whether guided batches share branches, projections are fused, and memory is in "
        'channels-last order. With "auto" this is done only on GPUs, so that CPU results stay bit-equal to those of '
        "the stock pipeline.",
    )
    compile: Literal["off", "inductor", "graphs"] = Field(
        "off",
        description='This key says how the denoiser is compiled. "inductor" is torch.compile, which takes minutes at '
        'the start. "graphs" is CUDA graphs, which help small batches. "off" does nothing.',
    )
    probe_batch: bool = Field(
        False,
        description="If this is true, a GPU takes as many images per batch as fit into its memory, instead of "
        "generator.batch_size.",
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description='This key says whether a batch is compared while the next one is sampled. With "auto" this is '
        "done only on GPUs.",
    )
    reference_cache_mib: int = Field(
        1024, ge=1, description="An actor keeps prepared reference images in this amount of memory, in MiB."
    )
    max_reject_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="If a larger share of rows than this is rejected, a complete scan ends with exit code 3, because "
        "its figures then hardly describe the prompts. If all rows are rejected, the exit code is 3 for any value of "
        "this key.",
    )
    watchdog_seconds: float = Field(
        1800,
        gt=0,
        le=10**7,
        description="A worker that has worked on one block for longer than this time, in seconds, is ended. Rows that "
        "cause this again on their own are rejected.",
    )
