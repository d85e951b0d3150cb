"""This module computes what Ray gives each stage: how many actors, how many rows per block, which device.

It does not use Ray.

On a machine without a GPU there is one process with one numeric thread per core, because two processes use two cores
fully, and one process with two threads does not. An actor asks Ray for only half a CPU, so that tasks for reading and
writing always find room, and a pipeline never waits for a slot, on one core or on many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from memscan.config import PROBED_IMAGES, CensusConfig
from memscan.errors import ConfigError
from pipelines.ray.session import Machine

ACTOR_CPUS = 0.5
WRITER_CPUS = 0.1
# Workers on one machine that one writer serves. With one for sixteen, blocks of a second at the end of a scan were
# sampled after 21 s and written after 28 (benchmarks.weak_scaling, two busy cores); two for two only cost a start.
WRITTEN_FOR = 4
# A worker that dies (out of memory, a lost GPU) is started again so often, and its block tried again; Ray Data's own
# default is for ever. A block with k rows that kill their worker needs 1 + k (`journal.py`).
MAX_RESTARTS = 16
# Blocks are so many times longer with a screen: few of their prompts are sampled, and these should fill a batch.
SCREENED = 16
# Where judging runs beside sampling, the last batch of a block is judged alone: of so many, that is a small share.
OVERLAPPED_BATCHES = 8


@dataclass(frozen=True)
class PoolLayout:
    """These are the resources of a job.

    Args:
        device: "cpu" or "cuda".
        samplers: actors that run the models.
        judges: actors that search and classify; 0 if the samplers do.
        threads: numeric threads of an actor.
        gpus: share of a GPU that a sampler holds.
        block: rows of one block, which is one task and the unit of retry.
        step: rows whose generations fill whole denoiser batches; blocks are multiples of it.
        local: whether one machine does it all.
    """

    device: str
    samplers: int
    judges: int
    threads: int
    gpus: float
    block: int
    step: int
    local: bool

    @classmethod
    def of(cls, config: CensusConfig, machine: Machine, rows: int) -> PoolLayout:
        """Return the layout for this number of rows.

        A cluster may start its GPUs when they are asked for: it is asked where `cuda` and the workers are given.

        Raises:
            ConfigError: `cuda` is asked for and Ray has no GPU, and there is no cluster that could be asked for them.
        """
        wanted = config.resources
        cuda = wanted.device == "cuda" or (wanted.device == "auto" and machine.gpus > 0)
        if cuda and machine.gpus <= 0 and machine.local:
            raise ConfigError("Ray sees no GPU", where="resources.device: cuda", hint="use auto or cpu")
        if cuda and machine.gpus <= 0 and wanted.samplers is None:
            raise ConfigError(
                "Ray sees no GPU yet",
                where="resources.device: cuda",
                hint="set resources.samplers to the number of actors to ask for",
            )
        whole = int(machine.gpus / wanted.sampler_gpus) if cuda else _cores(machine)
        samplers = max(1, min(wanted.samplers or whole, rows))
        processes = samplers + (wanted.judges or 0)
        return cls(
            device="cuda" if cuda else "cpu",
            samplers=samplers,
            judges=wanted.judges or 0,
            threads=max(1, _cores(machine) // processes) if machine.local else 1,
            gpus=wanted.sampler_gpus if cuda else 0.0,
            block=_block(config, rows, samplers, cuda),
            step=_step(config, cuda),
            local=machine.local,
        )

    @property
    def writer(self) -> dict[str, Any]:
        """Return arguments of the writer's map_batches; on one machine, as many writers as are worth their start."""
        from ray.data import TaskPoolStrategy

        size = math.ceil(self.samplers / WRITTEN_FOR) if self.local else None
        return {"num_cpus": WRITER_CPUS, "compute": TaskPoolStrategy(size=size)}


def actors(size: int, gpus: float = 0.0, parts: int = 1) -> dict[str, Any]:
    """Return arguments of map_batches for a fixed pool of actors.

    An actor may die this number of times per part on which it works.
    """
    from ray.data import ActorPoolStrategy

    share: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    return {
        # Two batches in flight keep an actor busy; more would lie in one's queue while another is idle at the end.
        "compute": ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        "num_cpus": ACTOR_CPUS,
        "max_restarts": MAX_RESTARTS * parts,
        "max_task_retries": MAX_RESTARTS,
        **share,
    }


def _cores(machine: Machine) -> int:
    return machine.cores if machine.local else max(1, int(machine.cpus))


def _batch(config: CensusConfig, cuda: bool) -> int:
    return PROBED_IMAGES if cuda and config.resources.probe_batch else config.generator.batch_size


def _step(config: CensusConfig, cuda: bool) -> int:
    return _batch(config, cuda) // math.gcd(_batch(config, cuda), config.generator.samples)


def _block(config: CensusConfig, rows: int, samplers: int, cuda: bool) -> int:
    """Return rows per block: full denoiser batches and, in a small job, enough blocks for all actors."""
    resources, samples = config.resources, config.generator.samples
    batch, step = _batch(config, cuda), _step(config, cuda)
    fair = math.ceil(rows / (4 * samplers))
    most = resources.prompts_per_block * (SCREENED if config.screen else 1)
    if cuda and resources.overlap != "off" and not resources.judges:
        most = max(most, math.ceil(OVERLAPPED_BATCHES * batch / samples))
    return max(1, min(most, fair) // step) * step
