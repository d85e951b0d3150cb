"""What a run may use of the machines. Nothing here decides a result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memscan.config.base import Section

# `resources.probe_batch` finds no more. More images in a batch gain nothing on any GPU of today (full at 8 to 32) and
# make a block, the unit of retry, long.
PROBED_IMAGES = 32


class ResourcesConfig(Section):
    """What Ray gives each stage. Defaults fit one machine; `docs/operations.md` has shapes for clusters."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description='The device that the models run on; with "auto" it is CUDA where there is a GPU.'
    )
    samplers: int | None = Field(
        None,
        ge=1,
        description="The number of actors that generate images. When it is not given, there is one per GPU, or one per "
        "CPU core without GPUs.",
    )
    judges: int | None = Field(
        None,
        ge=1,
        description="The number of actors that search the index and compare with the metric. When it is not given, the "
        "actors that generate do this as well.",
    )
    sampler_gpus: float = Field(
        1.0, gt=0, description="The share of a GPU, or the number of GPUs, that an actor that generates is given."
    )
    search: Literal["resident", "scatter"] = Field(
        "resident",
        description='"resident" keeps the whole index on every node; "scatter" gives each shard an actor of its own, '
        "for an index that is larger than a node's disk.",
    )
    prompts_per_block: int = Field(
        16,
        ge=1,
        description="The number of prompts that one task handles, which is the unit of retry; on GPUs a block has at "
        "least eight batches of the sampling.",
    )
    fast: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether guided batches share branches, projections are fused and memory is in channels-last "
        'order. With "auto" this is done on GPUs only, so that CPUs stay bit-equal to the stock pipeline.',
    )
    compile: Literal["off", "inductor", "graphs"] = Field(
        "off",
        description='How the denoiser is compiled: "inductor" is torch.compile, which takes minutes at the start; '
        '"graphs" is CUDA graphs, which help small batches; "off" does nothing.',
    )
    probe_batch: bool = Field(
        False,
        description="Whether a GPU takes as many images in a batch as its memory holds, in place of "
        "generator.batch_size.",
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description='Whether a batch is compared while the next one is sampled; with "auto" this is done on GPUs only.',
    )
    reference_cache_mib: int = Field(
        1024, ge=1, description="The memory that an actor keeps prepared reference images in, in MiB."
    )
    max_reject_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The share of rejected rows above which a complete scan ends with exit code 3: a census of what is "
        "left is hardly one of the prompts. All rows rejected is exit code 3 whatever is given here.",
    )
    watchdog_seconds: float = Field(
        1800,
        gt=0,
        le=10**7,
        description="The time in seconds after which a worker that is still at one block is ended; rows that did it "
        "again on their own are rejected.",
    )
