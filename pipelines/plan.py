"""What a census will take: stage rates from a sample of its own prompts (or recorded ones), then `memscan.planning`.

The sample goes through the very stages of the scan, in this process, one after another and without Ray: so every stage
is timed alone, whatever stage would hold it up in a pipeline.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from memscan import storage
from memscan.config import CensusConfig
from memscan.errors import ConfigError, InputError
from memscan.planning import (
    HOUR,
    Failures,
    Job,
    Outcome,
    Stage,
    bottleneck,
    coarser,
    estimate,
    simulate_many,
    split,
    throughput,
)

# Of the written files, zstd, as `tables.write_table` makes them.
_GB = 1e9
PRICES = ("gpu_hour", "cpu_hour", "gb_month")


@dataclass(frozen=True)
class Rates:
    """What one worker does, as measured.

    Args:
        stages: name -> prompts a second.
        startup: seconds in which a worker loads its models.
        bytes_per_prompt: of the census files.
        device: "cpu" or "cuda".
        sample: prompts that were timed.
    """

    stages: dict[str, float]
    startup: float
    bytes_per_prompt: float
    device: str
    sample: int


def read_rates(path: str) -> Rates:
    """Recorded rates, as `--save` writes them. Raises InputError where they are none."""
    data = storage.read_json(path)
    try:
        rates = Rates(**data)
        numbers = [*rates.stages.values(), rates.startup, rates.bytes_per_prompt]
        good = set(rates.stages) in ({"census"}, {"sample", "judge"}) and all(
            math.isfinite(number) and number >= 0 for number in numbers
        )
    except (TypeError, AttributeError):
        good = False
    if not good:
        raise InputError("holds no rates", where=path, hint="write them with: memscan plan ... --save FILE")
    return rates


def read_prices(path: str) -> dict[str, float]:
    """A YAML or JSON mapping with gpu_hour, cpu_hour and gb_month, in one currency; what is missing costs nothing."""
    try:
        data = yaml.safe_load(storage.read_bytes(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"is not YAML ({error})", where=path) from error
    if not isinstance(data, dict) or not set(data) <= set(PRICES):
        raise InputError("is not a price table", where=path, hint=f"keys: {', '.join(PRICES)}")
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in data.values()):
        raise InputError("has a price that is not a number from 0", where=path)
    return {name: float(data.get(name, 0.0)) for name in PRICES}


def measure(config: CensusConfig, sample: int) -> Rates:
    """Time the stages on the first prompts of a census.

    Raises:
        ConfigError: there is no built index to search in.
        MemscanError: what the scan itself would raise.
    """
    import torch

    from memscan.index.manifest import MANIFEST_FILE
    from memscan.prompts import read_prompts
    from pipelines.scanning.stages import Census, Judge, Plan, Sample

    index = config.index.path or storage.join(config.out, "index")
    if not storage.exists(storage.join(index, MANIFEST_FILE)):
        raise ConfigError(
            "no index to time the search in",
            where=index,
            hint="build it (memscan index build) and give it as index.path, or give recorded rates (--rates)",
        )
    device = "cuda" if config.resources.device != "cpu" and torch.cuda.is_available() else "cpu"
    table = read_prompts(config.prompts.model_copy(update={"limit": sample})).table
    plan = Plan(config, device, 1, index)
    started = time.perf_counter()
    stages: dict[str, Any] = (
        {"sample": Sample(plan), "judge": Judge(plan)} if config.resources.judges else {"census": Census(plan)}
    )
    for stage in stages.values():
        stage.work  # noqa: B018  raises what could not be loaded
    startup = time.perf_counter() - started
    block = config.resources.prompts_per_block
    seconds, pieces = dict.fromkeys(stages, 0.0), []
    for at in range(0, table.num_rows, block):
        rows = table.slice(at, block)
        for name, stage in stages.items():
            began = time.perf_counter()
            rows = stage(rows)
            seconds[name] += time.perf_counter() - began
        pieces.append(_written_bytes(rows))
    rates = {name: table.num_rows / spent for name, spent in seconds.items()}
    return Rates(rates, startup, sum(pieces) / table.num_rows, device, table.num_rows)


def _written_bytes(rows: Any) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return int(sink.getvalue().size)


def make_plan(
    config: CensusConfig,
    rates: Rates,
    *,
    prompts: int,
    workers: int,
    failures: Failures,
    prices: Mapping[str, float] | None = None,
    runs: int = 10,
) -> dict[str, Any]:
    """Predict a census.

    Args:
        workers: GPUs, or processes where the rates are a CPU's.
        prices: as `read_prices` gives them.

    Raises:
        ConfigError: fewer workers than one, or than two where the stages have pools of their own.
    """
    per_gpu = 1 / config.resources.sampler_gpus if rates.device == "cuda" else 1.0
    samplers = max(1, int(workers * per_gpu))
    gpus = rates.device == "cuda"
    stages = tuple(
        Stage(name, rate, gpus=config.resources.sampler_gpus if gpus and name != "judge" else 0.0)
        for name, rate in rates.stages.items()
    )
    block = min(config.resources.prompts_per_block, max(1, math.ceil(prompts / (4 * samplers))))
    job = Job(prompts, block, stages, rates.startup, rates.bytes_per_prompt)
    if len(stages) == 1:
        pools: tuple[int, ...] = (samplers,)
    elif gpus:  # judges run on the CPUs beside: as many as keep up with the GPUs
        pools = (samplers, max(1, math.ceil(samplers * stages[0].rate / stages[1].rate)))
    else:
        pools = split(job, workers)
    calm = estimate(job, pools)
    mean, late = simulate_many(coarser(job, pools), pools, failures, runs)
    names = [stage.name for stage in stages]
    return {
        "prompts": prompts,
        "workers": dict(zip(names, pools, strict=True)),
        "device": rates.device,
        "rates": asdict(rates),
        "bottleneck": bottleneck(job, pools),
        "prompts_per_second": throughput(job, pools),
        "without_failures": _figures(calm, job, pools),
        "expected": {**_figures(mean, job, pools), "lost_workers": mean.lost, "redone_blocks": mean.redone},
        "seconds_p90": late,
        "failures": {"mean_hours": failures.hours if math.isfinite(failures.hours) else None, "away": failures.away},
        "storage_bytes": round(prompts * rates.bytes_per_prompt),
        "cost": None if prices is None else _cost(mean, job, pools, prices),
    }


def _figures(outcome: Outcome, job: Job, pools: tuple[int, ...]) -> dict[str, Any]:
    return {"seconds": outcome.seconds, **_hours(outcome, job, pools), "busy": outcome.busy}


def _hours(outcome: Outcome, job: Job, pools: tuple[int, ...]) -> dict[str, float]:
    hours = outcome.seconds / HOUR
    return {
        f"{kind[:-1]}_hours": hours
        * sum(getattr(stage, kind) * count for stage, count in zip(job.stages, pools, strict=True))
        for kind in ("gpus", "cpus")
    }


def _cost(outcome: Outcome, job: Job, pools: tuple[int, ...], prices: Mapping[str, float]) -> dict[str, float]:
    hours = _hours(outcome, job, pools)
    parts = {
        "gpu": hours["gpu_hours"] * prices["gpu_hour"],
        "cpu": hours["cpu_hours"] * prices["cpu_hour"],
        "storage_month": job.prompts * job.bytes_per_prompt / _GB * prices["gb_month"],
    }
    return {**parts, "total": sum(parts.values())}


def describe(plan: Mapping[str, Any]) -> str:
    """A plan for a person."""
    expected, rates = plan["expected"], plan["rates"]
    pools = ", ".join(f"{count:,} {name}" for name, count in plan["workers"].items())
    each = ", ".join(f"{name} {rate:.3g}/s" for name, rate in rates["stages"].items())
    busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in expected["busy"].items())
    lines = [
        f"prompts       {plan['prompts']:,}",
        f"workers       {pools} (on {plan['device']}; one does {each}, from {rates['sample']:,} prompts)",
        f"throughput    {plan['prompts_per_second']:,.1f} prompts/s; the bottleneck is {plan['bottleneck']}",
        f"time          {_span(expected['seconds'])}, nine times of ten below {_span(plan['seconds_p90'])}",
        f"              {_span(plan['without_failures']['seconds'])} without failures",
        f"busy          {busy}",
        f"GPU-hours     {expected['gpu_hours']:,.1f}   CPU-hours {expected['cpu_hours']:,.1f}",
        f"losses        {expected['lost_workers']:.1f} workers, {expected['redone_blocks']:.1f} blocks done again",
        f"storage       {plan['storage_bytes'] / _GB:,.2f} GB",
    ]
    if plan["cost"] is not None:
        parts = "   ".join(f"{name} {value:,.2f}" for name, value in plan["cost"].items())
        lines.append(f"cost          {parts}")
    return "\n".join(lines)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def save_rates(path: str, rates: Rates) -> None:
    """Record rates for `read_rates`."""
    storage.write_atomic(path, (json.dumps(asdict(rates), indent=2) + "\n").encode())
