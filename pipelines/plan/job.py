"""This module estimates a census from the rates of its stages.

`measure.py` measures them, and `memscan.planning` has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from memscan.config import CensusConfig
from memscan.planning import (
    HOUR,
    Failures,
    Forecast,
    Job,
    Stage,
    bottleneck,
    estimate,
    simulate_many,
    split,
    throughput,
)
from pipelines.plan.rates import Rates
from pipelines.ray.layout import WRITTEN_FOR

_GB = 1e9
# Of the driver's time, for every block that Ray Data hands out and takes in, as measured (docs/benchmarks.md).
BLOCK_SECONDS = 0.009
# So many workers are taken for one machine, where writers are counted; on a cluster there are as many as needed.
ONE_MACHINE = 8


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
    """Predict time and cost of a census.

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
    last = _last_steps(rates, block, samplers)
    job = Job(prompts, block, stages, rates.startup, rates.bytes_per_prompt, min(last.values()))
    if len(stages) == 1:
        pools: tuple[int, ...] = (samplers,)
    elif gpus:  # judges run on the CPUs beside: as many as keep up with the GPUs
        pools = (samplers, max(1, math.ceil(samplers * stages[0].rate / stages[1].rate)))
    else:
        pools = split(job, workers)
    calm = estimate(job, pools)
    mean, late = simulate_many(job, pools, failures, runs)
    names = [stage.name for stage in stages]
    return {
        "prompts": prompts,
        "workers": dict(zip(names, pools, strict=True)),
        "device": rates.device,
        "rates": asdict(rates),
        "bottleneck": slowest if (slowest := bottleneck(job, pools)) != "write" else min(last, key=lambda at: last[at]),
        "prompts_per_second": throughput(job, pools),
        "index": _index(rates, samplers, gpus * config.resources.sampler_gpus),
        "without_failures": _figures(calm, job, pools),
        "expected": {**_figures(mean, job, pools), "lost_workers": mean.lost, "redone_blocks": mean.redone},
        "seconds_p90": late,
        "failures": {"mean_hours": failures.hours if math.isfinite(failures.hours) else None, "away": failures.away},
        "storage_bytes": round(prompts * rates.bytes_per_prompt),
        "cost": None if prices is None else _cost(mean, job, pools, prices),
    }


def _last_steps(rates: Rates, block: int, samplers: int) -> dict[str, float]:
    """Return prompts per second that writers and driver can take; infinite if that was not measured."""
    writers = math.ceil(samplers / WRITTEN_FOR) if samplers <= ONE_MACHINE else samplers
    commit = 0.0 if rates.commit is None else 1 / rates.commit
    driver = commit + BLOCK_SECONDS / block
    return {"write": math.inf if rates.write is None else rates.write * writers, "driver": 1 / driver}


def _index(rates: Rates, workers: int, gpus: float) -> dict[str, float | None] | None:
    """Return the time for the references before the scan; None if the index exists."""
    if rates.index is None:
        return None
    seconds = None if rates.references is None else rates.references / (rates.index * workers)
    hours = None if seconds is None else seconds / HOUR * workers * gpus
    return {"references": rates.references, "rate": rates.index * workers, "seconds": seconds, "gpu_hours": hours}


def _figures(forecast: Forecast, job: Job, pools: tuple[int, ...]) -> dict[str, Any]:
    return {"seconds": forecast.seconds, **_hours(forecast, job, pools), "busy": forecast.busy}


def _hours(forecast: Forecast, job: Job, pools: tuple[int, ...]) -> dict[str, float]:
    hours = forecast.seconds / HOUR
    return {
        f"{kind[:-1]}_hours": hours
        * sum(getattr(stage, kind) * count for stage, count in zip(job.stages, pools, strict=True))
        for kind in ("gpus", "cpus")
    }


def _cost(forecast: Forecast, job: Job, pools: tuple[int, ...], prices: Mapping[str, float]) -> dict[str, float]:
    hours = _hours(forecast, job, pools)
    parts = {
        "gpu": hours["gpu_hours"] * prices["gpu_hour"],
        "cpu": hours["cpu_hours"] * prices["cpu_hour"],
        "storage_month": job.prompts * job.bytes_per_prompt / _GB * prices["gb_month"],
    }
    return {**parts, "total": sum(parts.values())}


def describe(plan: Mapping[str, Any]) -> str:
    """Return a plan as text for a person."""
    expected, rates = plan["expected"], plan["rates"]
    pools = ", ".join(f"{count:,} {name}" for name, count in plan["workers"].items())
    each = ", ".join(f"{name} {rate:.3g}/s" for name, rate in rates["stages"].items())
    busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in expected["busy"].items())
    lines = [
        f"prompts       {plan['prompts']:,}",
        f"workers       {pools} (on {plan['device']}; one does {each}, from {rates['sample']:,} prompts)",
        *_describe_uncertainty(rates),
        *_describe_index(plan["index"]),
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


def _describe_uncertainty(rates: Mapping[str, Any]) -> list[str]:
    """Return how sure the rates are, and so the time; nothing of files that do not say."""
    found = rates.get("uncertainty") or {}
    lines = []
    for name, share in found.items():
        blocks = (rates.get("blocks") or {}).get(name)
        if share is None:
            text = "measured on one block only, which may be its worker's first: it can be wrong by several times"
            lines.append(f"rate          {name}: {text}; give a larger --sample")
        else:
            lines.append(f"rate          {name}: ± {100 * share:.0f} % (95 %, {blocks} blocks), and so is the time")
    return lines


def _describe_index(index: Mapping[str, Any] | None) -> list[str]:
    if index is None:
        return []
    if index["seconds"] is None:
        return [f"index         to be built first, at {index['rate']:,.1f} references/s (tars are not counted)"]
    build = f"{index['references']:,} references first: {_span(index['seconds'])}"
    return [f"index         {build}, {index['gpu_hours']:,.1f} GPU-hours; then"]


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"
