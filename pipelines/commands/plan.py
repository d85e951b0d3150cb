"""This module is the command `memscan plan`, which estimates time and cost of a census before it is paid for."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, ConfigPath, Overrides, World, configuration, guarded, say, show


def plan(
    config_path: ConfigPath = None,
    overrides: Overrides = None,
    world: World = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Plan for this number of GPUs, or of processes if the rates were measured on a CPU.",
        ),
    ] = 1,
    prompts: Annotated[
        float, typer.Option(metavar="N", help="Plan for this number of prompts, for example 5e6.")
    ] = 1e6,
    sample: Annotated[int, typer.Option(min=1, metavar="N", help="Time the stages on this number of prompts.")] = 200,
    rates: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Read the rates from this file, as --save writes it, and time no sample."),
    ] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Write the measured rates to this file.")] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Read the prices gpu_hour, cpu_hour and gb_month from this YAML file."),
    ] = None,
    lost_every: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS",
            help="This is the mean time between two losses of one worker, in hours; 5 to 50 is usual on spot machines.",
        ),
    ] = None,
    away: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="This is the time until the replacement of a lost worker starts to load its models, in seconds.",
        ),
    ] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Estimate time, GPU-hours, storage, cost and bottleneck of a census, from a sample or from recorded rates.

    memscan plan census.yaml --gpus 64 --prompts 5e6 --sample 200 --save rates.json

    memscan plan census.yaml --gpus 64 --prompts 5e6 --rates rates.json --lost-every 20 --prices prices.yaml
    """
    with guarded():
        from memscan.errors import ConfigError
        from memscan.planning import Failures
        from pipelines.plan.job import describe, make_plan
        from pipelines.plan.measure import measure
        from pipelines.plan.rates import read_prices, read_rates, save_rates

        if not (math.isfinite(prompts) and 1 <= prompts <= 1e12):
            raise ConfigError(f"{prompts:g} prompts cannot be planned", where="--prompts", hint="give 1 to 1e12")
        if lost_every is not None and not (math.isfinite(lost_every) and lost_every > 0):
            raise ConfigError(f"{lost_every:g} is no mean time in hours", where="--lost-every")
        config = configuration(config_path, overrides, world)
        table = read_prices(prices) if prices else None
        known = read_rates(rates) if rates else measure(config, sample, say)
        if save:
            save_rates(save, known)
        failures = Failures(lost_every if lost_every is not None else math.inf, away)
        found = make_plan(config, known, prompts=round(prompts), workers=gpus, failures=failures, prices=table)
        if known.device == "cpu":
            say("memscan: these are the rates of a CPU; measure on a GPU to plan for GPUs")
        show(json.dumps(found, indent=2) if as_json else describe(found))
