"""What the benchmarks of the sampling path share: the device, its clock, its matrix peak, and the models to run."""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pyarrow as pa
import torch

from benchmarks.published import ARCHITECTURES, build_pipeline
from memscan.planted.world import world_config
from memscan.records import PROMPTS, prompt_id

MODELS = ("planted", *ARCHITECTURES)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MATRICES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say what runs where."""
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(PRECISIONS), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--threads", type=int, help="of a CPU; default torch's own")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--batch", type=int, default=8, help="images in one denoiser batch")
    parser.add_argument("--fast", choices=("auto", "on", "off"), default="on", help="resources.fast")
    parser.add_argument("--compile", choices=("off", "inductor", "graphs"), default="off", help="resources.compile")


def settle(arguments: argparse.Namespace) -> torch.device:
    """Fill in defaults that depend on the device, and set the threads."""
    device = torch.device(arguments.device)
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.threads = torch.get_num_threads()
    return device


def environment(device: torch.device) -> dict[str, str]:
    """What a figure must name: device, versions, date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cuda": str(torch.version.cuda)}
    return {"device": name, **versions, "date": datetime.date.today().isoformat()}


def stock_pipeline(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The stock pipeline with DDIM: the shipped planted world's checkpoint, or published sizes with random weights."""
    if name != "planted":
        torch.manual_seed(0)
        return build_pipeline(name, folder, device=str(device), dtype=dtype)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        world_config().generator.path, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def captions(count: int) -> list[str]:
    """Distinct captions."""
    return [f"a photograph of house number {number} in a quiet street" for number in range(count)]


def prompt_table(captions: list[str]) -> pa.Table:
    """Captions as rows of PROMPTS, as a scan hands them to its workers."""
    rows = [
        {"prompt_id": prompt_id(one), "caption": one, "count": 1, "source": "benchmark", "row": at, "status": "done"}
        for at, one in enumerate(captions, start=1)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def wait(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, from an idle device to an idle device."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def matrix_peak(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """FLOP/s of the fastest square matrix product found: the most that networks can reach here."""
    best = 0.0
    for size in _MATRICES[device.type]:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(one, other)
        # Long enough to be told from a clock's noise, short enough not to heat a chip below its usual clock.
        calls = max(1, int(2e12 if device.type == "cuda" else 2e10) // (2 * size**3))
        for _ in range(repeats):
            taken = seconds(
                lambda one=one, other=other, calls=calls: [torch.mm(one, other) for _ in range(calls)], device
            )
            best = max(best, calls * 2 * size**3 / taken)
    return best
