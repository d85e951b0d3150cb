"""Actors, threads and block sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.config import CensusConfig, parse_config
from memscan.errors import ConfigError
from pipelines.ray.layout import ACTOR_CPUS, PoolLayout
from pipelines.ray.session import Machine

TWO_CORES = Machine(cpus=2, gpus=0, cores=2, local=True)
ONE_CORE = Machine(cpus=2, gpus=0, cores=1, local=True)
EIGHT_GPUS = Machine(cpus=64, gpus=8, cores=16, local=False)


def config(samples: int = 4, batch: int = 8, **resources: Any) -> CensusConfig:
    return parse_config(
        {
            "prompts": {"paths": ["p"]},
            "generator": {"path": "g", "samples": samples, "batch_size": batch},
            "segmenter": {"path": "s"},
            "embedder": {"path": "e"},
            "index": {"path": "i"},
            "resources": resources,
        }
    )


def test_two_cores_are_two_processes_with_one_thread() -> None:
    layout = PoolLayout.of(config(), TWO_CORES, rows=1000)
    assert (layout.device, layout.samplers, layout.judges, layout.threads) == ("cpu", 2, 0, 1)
    assert layout.samplers * ACTOR_CPUS < TWO_CORES.cpus


def test_one_core_works_too() -> None:
    layout = PoolLayout.of(config(), ONE_CORE, rows=1000)
    assert (layout.samplers, layout.threads) == (1, 1)


def test_one_sampler_a_gpu_by_default() -> None:
    layout = PoolLayout.of(config(), EIGHT_GPUS, rows=10_000)
    assert (layout.device, layout.samplers, layout.gpus) == ("cuda", 8, 1.0)
    assert PoolLayout.of(config(sampler_gpus=0.5), EIGHT_GPUS, rows=10_000).samplers == 16


def test_the_cpu_can_be_chosen_beside_a_gpu() -> None:
    layout = PoolLayout.of(config(device="cpu", samplers=3, judges=2), EIGHT_GPUS, rows=10_000)
    assert (layout.device, layout.samplers, layout.judges, layout.gpus) == ("cpu", 3, 2, 0.0)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        PoolLayout.of(config(device="cuda"), TWO_CORES, rows=10)


def test_a_cluster_of_a_head_alone_is_asked_for_gpus() -> None:
    """Autoscaling clusters start with none; how many there should be must then be said."""
    head = Machine(cpus=0, gpus=0, cores=8, local=False)
    layout = PoolLayout.of(config(device="cuda", samplers=32), head, rows=100_000)
    assert (layout.device, layout.samplers, layout.gpus) == ("cuda", 32, 1.0)
    with pytest.raises(ConfigError, match=r"set resources\.samplers"):
        PoolLayout.of(config(device="cuda"), head, rows=10)


def test_no_more_actors_than_rows() -> None:
    assert PoolLayout.of(config(), TWO_CORES, rows=1).samplers == 1


@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 256), st.integers(1, 20_000), st.sampled_from([1, 2, 8]))
def test_blocks_fill_denoiser_batches(samples: int, batch: int, limit: int, rows: int, samplers: int) -> None:
    layout = PoolLayout.of(config(samples, batch, prompts_per_block=limit, samplers=samplers), TWO_CORES, rows)
    assert layout.block >= 1
    assert layout.block * samples % batch == 0
    # Above the limit only where one full denoiser batch needs it.
    assert layout.block <= max(limit, batch)


def test_on_a_gpu_a_block_has_batches_to_overlap() -> None:
    """The last batch of a block is judged alone; where judging never overlaps, blocks stay as small as configured."""
    assert PoolLayout.of(config(samples=4, batch=8), EIGHT_GPUS, rows=100_000).block == 16
    assert PoolLayout.of(config(samples=4, batch=16), EIGHT_GPUS, rows=100_000).block == 32
    assert PoolLayout.of(config(samples=4, batch=8, probe_batch=True), EIGHT_GPUS, rows=100_000).block == 64
    assert PoolLayout.of(config(samples=4, batch=8, prompts_per_block=200), EIGHT_GPUS, rows=100_000).block == 200
    assert PoolLayout.of(config(samples=4, batch=16, overlap="off"), EIGHT_GPUS, rows=100_000).block == 16
    assert PoolLayout.of(config(samples=4, batch=16), TWO_CORES, rows=100_000).block == 16


def test_small_jobs_end_together() -> None:
    layout = PoolLayout.of(config(prompts_per_block=64), TWO_CORES, rows=64)
    assert layout.block == 8
