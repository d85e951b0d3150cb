"""This module keeps the rates of a census's stages in a file, and reads the price table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import yaml

from memscan.errors import InputError
from memscan.io import storage

PRICES = ("gpu_hour", "cpu_hour", "gb_month")


@dataclass(frozen=True)
class Rates:
    """These are the measured rates of one worker.

    Args:
        stages: name -> prompts per second.
        startup: seconds until a worker is at its pace: Ray, its process, its models, what only its first block pays.
        bytes_per_prompt: of the census files.
        device: "cpu" or "cuda".
        sample: prompts that were timed.
        workers: that worked at the same time while they were timed.
        block: rows of a block in the sample.
        write: rows per second of one writer, into the storage of the run; None if it was not measured.
        commit: rows per second that the driver commits; None if it was not measured.
        index: references per second that one worker describes; None if the index was there.
        blocks: stage -> blocks behind its rate, without each worker's first where there were others; None in old files.
        uncertainty: stage -> half the width of the 95 % interval of its rate, as a share of it; None if only one
            block was timed, so that the error of the rate is not known.
        references: that the index is still to be built of; None if it was there, or how many is not known.
    """

    stages: dict[str, float]
    startup: float
    bytes_per_prompt: float
    device: str
    sample: int
    workers: int = 1
    block: int | None = None
    write: float | None = None
    commit: float | None = None
    index: float | None = None
    references: int | None = None
    blocks: dict[str, int] | None = None
    uncertainty: dict[str, float | None] | None = None


def read_rates(path: str) -> Rates:
    """Return recorded rates, as `save_rates` writes them. Raises InputError if the file holds none."""
    data = storage.read_json(path)
    try:
        rates = Rates(**data)
        optional = [rates.write, rates.commit, rates.index, rates.references, rates.block]
        numbers = [*rates.stages.values(), rates.startup, rates.bytes_per_prompt, rates.sample, rates.workers]
        shares = [share for share in (rates.uncertainty or {}).values() if share is not None]
        good = (
            all(math.isfinite(share) and share >= 0 for share in shares)
            and set(rates.stages) in ({"census"}, {"sample", "judge"})
            and rates.device in ("cpu", "cuda")
            and all(math.isfinite(number) and number >= 0 for number in numbers)
            and all(number is None or (math.isfinite(number) and number > 0) for number in optional)
        )
    except (TypeError, AttributeError):
        good = False
    if not good:
        raise InputError("holds no rates", where=path, hint="write them with: memscan plan ... --save FILE")
    return rates


def save_rates(path: str, rates: Rates) -> None:
    """Record rates for `read_rates`."""
    storage.write_atomic(path, (json.dumps(asdict(rates), indent=2) + "\n").encode())


def read_prices(path: str) -> dict[str, float]:
    """Return a mapping with gpu_hour, cpu_hour and gb_month, in one currency, from YAML or JSON.

    What is missing costs nothing.
    """
    try:
        data = yaml.safe_load(storage.read_bytes(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"is not YAML ({error})", where=path) from error
    if not isinstance(data, dict) or not set(data) <= set(PRICES):
        raise InputError("is not a price table", where=path, hint=f"keys: {', '.join(PRICES)}")
    numbers = [value for value in data.values() if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(data) or not all(0 <= value < math.inf for value in numbers):
        raise InputError("has a price that is not a number of at least 0", where=path)
    return {name: float(data.get(name, 0.0)) for name in PRICES}
