"""What a scan's signals cost: time of sampling with each set of hooks, and of what compares images, a generation.

The denoiser makes the same calls with all of them (counted). Hooks are timed in turn and again, so that a machine's
drift meets them alike; the best of each is taken.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks._machine import PRECISIONS, add_arguments, captions, environment, seconds, settle, stock_pipeline
from benchmarks.published import as_checkpoint
from memscan.config import GeneratorConfig, ResourcesConfig
from memscan.detection.sampled import AttentionHook, tiled_similarity
from memscan.io.images import encode_mask
from memscan.models.acceleration import Acceleration
from memscan.models.calls import CallCounter
from memscan.models.generator import Generator
from memscan.models.hooks import DifferenceMapHook, NoiseNormHook


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(options)
    device = settle(arguments)
    settings = {name: getattr(arguments, name) for name in ("steps", "guidance", "dtype")}
    config = GeneratorConfig(path=arguments.model, batch_size=arguments.batch, **settings)
    resources = ResourcesConfig(fast=arguments.fast, compile=arguments.compile)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = stock_pipeline(arguments.model, Path(folder), device, PRECISIONS[arguments.dtype])
        parts = as_checkpoint(pipeline, arguments.model)
        generator = Generator(parts, config, acceleration=Acceleration.of(resources, device))
    sets = {
        "none": (),
        "noise norms": (NoiseNormHook(),),
        "and the map": (NoiseNormHook(), DifferenceMapHook()),
        "and attention": (NoiseNormHook(), DifferenceMapHook(), AttentionHook(parts.unet)),
    }
    count = generator.batch_size
    texts, taken, calls = captions(count), dict.fromkeys(sets, float("inf")), {}
    for name, hooks in sets.items():  # compiles and finds sizes, too
        generator.hooks = hooks
        with CallCounter(generator.denoiser) as counter:
            made = generator.generate(texts, range(count))
        calls[name] = counter.calls
    for _ in range(arguments.repeats):
        for name, hooks in sets.items():
            generator.hooks = hooks
            taken[name] = min(taken[name], seconds(lambda: generator.generate(texts, range(count)), device))
    rows = {name: 1000 * value / count for name, value in taken.items()}
    four = made.images_BHWC[np.arange(4) % count]
    rows["tiled L2 of four"] = 1000 * _best(lambda: tiled_similarity(four), arguments.repeats) / 4
    maps = made.maps_Bhw
    assert maps is not None
    rows["PNG of a map"] = 1000 * _best(lambda: encode_mask(np.nan_to_num(maps[0])), arguments.repeats)
    print(f"{'hooks':20}{'ms per generation':>18}{'more':>9}")
    for name, value in rows.items():
        more = f"{value / rows['none'] - 1:8.1%}" if name in sets else f"{value / rows['none']:8.1%}"
        print(f"{name:20}{value:18.3f}{more:>9}")
    result = {
        "benchmark": "signals",
        "settings": vars(arguments),
        "machine": environment(device),
        "milliseconds": rows,
        "calls": calls,
        "ratio": {"all hooks": rows["and attention"] / rows["none"]},
    }
    print(json.dumps(result))


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(max(1, repeats)):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
