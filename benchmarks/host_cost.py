"""What the host does while a GPU samples: measured without a GPU, on tensors without values.

Counts are taken at the published size on the device `meta`. The host's time of a step is that of the same network,
block by block, made so narrow that a CPU spends its time on launching kernels and not on computing: if it is longer
than the kernels take, a GPU waits (the launch-bound limit). A value that the loop reads would stop the host until the
device has it; a copy between host and device costs bandwidth that nothing hides.

    reads        values of the device that the loop asks for, in a whole sampling      target 0
    kernels      operations of one guided step, ours against the stock network's       target: no more than stock, 1 %
    host ms      the host's time of one guided step                                    target: less than the device's
    copied       bytes between host and device, per image, in the loop                 target: the noise alone

The noise is drawn in single precision on the CPU, where a seed means one image on every machine: 4 x 64 x 64 numbers
are 64 KiB for an image of SD 1.x, 256 KiB for one of XL. The device's least time of a step is that of `_roofline.py` on
an H200: 45 ms for SD 1.x and a batch of 16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._machine import environment
from benchmarks._roofline import H200, counted
from benchmarks.published import ARCHITECTURES, build_pipeline, narrowed
from memscan.models.hooks import DifferenceMapHook, NoiseNormHook
from memscan.models.sampling import Condition, initial_latents, sample
from memscan.models.schedulers import make_scheduler
from memscan.models.text import size_ids
from memscan.models.unet import SplitUNet, why_not


def main(options: list[str] | None = None) -> None:
    arguments = _parse(options)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        counting = build_pipeline(arguments.model, Path(folder), device="meta", dtype=torch.bfloat16)
        timing = build_pipeline(narrowed(ARCHITECTURES[arguments.model]), Path(folder))
        for name in ("stock network", "ours"):
            # In this order: sharing branches takes the network's modules over.
            rows[name] = _counted(counting, name, arguments) | _timed(timing, name, arguments)
    heads = ("reads", "kernels per step", "host ms per step", "H200 ms per step", "KiB per image")
    print(f"{'':16}" + "".join(f"{head:>20}" for head in heads))
    for name, row in rows.items():
        copied = row["copied_bytes_per_image"] / 1024
        figures = (row["reads"], row["kernels"], row["host_ms"], row["device_ms"], copied)
        print(f"{name:16}" + "".join(f"{figure:20.1f}" for figure in figures))
    result = {
        "benchmark": "host_cost",
        "settings": vars(arguments),
        "machine": environment(torch.device("cpu")),
        "figures": rows,
        "ratio": {
            "kernels": rows["ours"]["kernels"] / rows["stock network"]["kernels"],
            "host_ms": rows["ours"]["host_ms"] / rows["stock network"]["host_ms"],
        },
    }
    print(json.dumps(result))


def _parse(options: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd1", "xl", "tiny", "tiny-xl"), default="sd1")
    parser.add_argument("--batch", type=int, default=16, help="images in one denoiser batch")
    parser.add_argument("--steps", type=int, default=4, help="steps of the sampling that is counted and timed")
    parser.add_argument("--repeats", type=int, default=3, help="samplings that are timed; the fastest counts")
    return parser.parse_args(options)


def _counted(pipeline: Any, name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Operations, reads and copies of one sampling, per step or per image."""
    with torch.no_grad(), counted() as work:
        _sampling(pipeline, name, arguments)
    return {
        "reads": float(sum(work.reads.values())),
        "kernels": work.kernels / arguments.steps,
        "device_ms": 1000 * work.seconds(H200) / arguments.steps,
        "copied_bytes_per_image": work.copied / arguments.batch,
    }


def _timed(pipeline: Any, name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The fastest of some samplings of a narrow network, per step."""
    times = []
    for _ in range(arguments.repeats + 1):  # the first warms up
        started = time.perf_counter()
        _sampling(pipeline, name, arguments)
        times.append(time.perf_counter() - started)
    return {"host_ms": 1000 * min(times[1:]) / arguments.steps}


def _sampling(pipeline: Any, name: str, arguments: argparse.Namespace) -> None:
    """One sampling with the hooks that a scan has, where the pipeline's network is."""
    unet, config, batch = pipeline.unet, pipeline.unet.config, arguments.batch
    network = unet if name == "stock network" or why_not(unet) else SplitUNet(unet)
    place = {"dtype": unet.dtype, "device": unet.device}
    text = torch.zeros(batch, pipeline.tokenizer.model_max_length, config.cross_attention_dim, **place)
    pooled = sizes = None
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.zeros(batch, width, **place)
        side = config.sample_size * pipeline.vae_scale_factor
        sizes = size_ids(side, side, pooled)
    condition = Condition(
        text_BTD=text,
        empty_1TD=text[:1],
        guidance=7.0,
        pooled_BP=pooled,
        empty_pooled_1P=None if pooled is None else pooled[:1],
        sizes_16=sizes,
        ends_B=torch.zeros(batch, dtype=torch.int64, device=unet.device),
    )
    noise, generators = initial_latents(range(batch), (config.in_channels, config.sample_size, config.sample_size))
    scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler.config, where=arguments.model)
    hooks = (NoiseNormHook(), DifferenceMapHook())
    sample(network, scheduler, condition, noise, generators, arguments.steps, hooks)


if __name__ == "__main__":
    main()
