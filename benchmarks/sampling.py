"""Images a second of our sampling and its share of the matrix peak, against the stock pipeline on the same networks.

(a) the stock pipeline called prompt by prompt, as research scripts do; (b) the stock pipeline called with a batch; and
ours as `resources.fast` and `resources.compile` have it. All get the same captions and latents, in the same precision,
and their images are compared. The peak is that of the fastest square matrix product in the same precision in the same
run; arithmetic is counted on the network as it is called (products and convolutions of denoiser and decoder).

Then the screen: one denoiser call a prompt with a cached prediction without caption, against a loop over prompts that
encodes both captions and calls the denoiser on both.

Networks have random weights in the published sizes, which cost what the published checkpoints cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._machine import (
    PRECISIONS,
    add_arguments,
    captions,
    environment,
    matrix_peak,
    seconds,
    settle,
    stock_pipeline,
)
from benchmarks.published import as_checkpoint
from memscan.config import GeneratorConfig, ResourcesConfig, ScreenConfig
from memscan.detection.first_step import bank_seeds
from memscan.evaluation.sampling import MODES
from memscan.models.acceleration import Acceleration
from memscan.models.denoiser import first_input
from memscan.models.generator import Generator
from memscan.models.sampling import initial_latents
from memscan.models.schedulers import make_scheduler
from memscan.models.text import size_ids
from memscan.models.unet import SplitUNet, call_options, why_not
from memscan.worker.screen import Screen

LOSSY = {name: mode.generator for name, mode in MODES.items() if mode.lossy}


@dataclass(frozen=True)
class Timed:
    """A way of sampling: images per second, share of the peak (None where not counted), and some images."""

    rate: float
    share: float | None
    images_BHWC: np.ndarray


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """The settings of a measurement, from the command line's words."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=0, help="of (b) and ours; default two batches")
    parser.add_argument("--one-by-one", type=int, default=4, help="images of (a)")
    parser.add_argument("--probe", action="store_true", help="resources.probe_batch: our batch fills the GPU's memory")
    parser.add_argument("--screen", type=int, default=256, help="prompts of the screen; 0 leaves it out")
    parser.add_argument("--screen-batch", type=int, default=32, help="generator.batch_size of the screen")
    parser.add_argument("--screen-loop", type=int, default=16, help="prompts of the loop beside it")
    parser.add_argument("--lossy", action="store_true", help="time the lossy modes too (docs/speed.md)")
    arguments = parser.parse_args(options)
    arguments.images = arguments.images or 2 * arguments.batch
    return arguments


def main(options: list[str] | None = None) -> None:
    arguments = parse(options)
    device = settle(arguments)
    dtype = PRECISIONS[arguments.dtype]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        pipeline = stock_pipeline(arguments.model, Path(folder), device, dtype)
        peak = matrix_peak(device, dtype)
        # The stock pipeline first: ours changes the network's memory format and projections in place.
        loop = loop_of_prompts(pipeline, arguments, device) if arguments.screen else None
        timed = {"one by one": stock(pipeline, arguments, peak, 1, arguments.one_by_one)}
        timed["batched"] = stock(pipeline, arguments, peak, arguments.batch, arguments.images)
        timed["ours"] = ours(pipeline, arguments, device, peak)
        for name, change in LOSSY.items() if arguments.lossy else ():
            timed[name] = ours(pipeline, arguments, device, None, **change)
        screen = screened(pipeline, arguments, device, loop) if loop is not None else None
    print(f"{'':20}{'images/s':>10}{'of the peak':>14}{'ours, times as fast':>22}")
    for name, row in timed.items():
        share = f"{row.share:13.1%}" if row.share is not None else ""
        print(f"{name:20}{row.rate:10.3f}{share:>14}{timed['ours'].rate / row.rate:22.2f}")
    result = {
        "benchmark": "sampling",
        "settings": vars(arguments),
        "machine": environment(device),
        "peak_teraflops": peak / 1e12,
        "images_per_second": {name: row.rate for name, row in timed.items()},
        "share_of_peak": {name: row.share for name, row in timed.items() if row.share is not None},
        "levels_from_stock": levels(timed["ours"].images_BHWC, timed["batched"].images_BHWC),
        "ratio": {name: timed["ours"].rate / timed[name].rate for name in ("one by one", "batched")},
    }
    print(f"peak {peak / 1e12:.3f} TFLOP/s; images {result['levels_from_stock']:.3f} levels from (b) on average")
    if screen is not None:
        result |= {"screen": screen}
        print(
            f"screen {screen['prompts_per_second']:.1f} prompts/s, loop {screen['loop']:.2f}, "
            f"ratio {screen['ratio']:.1f}"
        )
    if device.type == "cuda":
        result |= {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    print(json.dumps(result))


def _noise(pipeline: Any, count: int) -> torch.Tensor:
    """Latents of seeds 0, 1, ... as our sampling draws them."""
    side = pipeline.unet.config.sample_size
    return initial_latents(range(count), (pipeline.unet.config.in_channels, side, side))[0]


def stock(pipeline: Any, arguments: argparse.Namespace, peak: float, batch: int, count: int) -> Timed:
    noise, texts = _noise(pipeline, count).to(pipeline.device, pipeline.unet.dtype), captions(count)
    pipeline.scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler.config, where=arguments.model)
    images: list[np.ndarray] = []

    def call(steps: int, at: int) -> None:
        made = pipeline(
            prompt=texts[at : at + batch],
            num_inference_steps=steps,
            guidance_scale=arguments.guidance,
            latents=noise[at : at + batch],
        )
        images.extend(np.asarray(image) for image in made.images)

    call(min(2, arguments.steps), 0)
    images.clear()
    taken = seconds(lambda: [call(arguments.steps, at) for at in range(0, count, batch)], noise.device)
    share = count * _flop(pipeline, arguments.steps, shared=False) / taken / peak
    return Timed(count / taken, share, np.stack(images))


def _generator(
    pipeline: Any, arguments: argparse.Namespace, device: torch.device, batch: int, **more: Any
) -> Generator:
    settings = {"steps": arguments.steps, "guidance": arguments.guidance, "dtype": arguments.dtype, "batch_size": batch}
    config = GeneratorConfig(path=arguments.model, **(settings | more))
    resources = ResourcesConfig(fast=arguments.fast, compile=arguments.compile, probe_batch=arguments.probe)
    return Generator(as_checkpoint(pipeline, arguments.model), config, acceleration=Acceleration.of(resources, device))


def ours(pipeline: Any, arguments: argparse.Namespace, device: torch.device, peak: float | None, **lossy: Any) -> Timed:
    generator = _generator(pipeline, arguments, device, arguments.batch, **lossy)
    count = max(arguments.images, generator.batch_size) // generator.batch_size * generator.batch_size
    texts, seeds = captions(count), list(range(count))
    generator.generate(texts[: generator.batch_size], seeds[: generator.batch_size])  # compiles, records, finds sizes
    made: list[np.ndarray] = []
    taken = seconds(lambda: made.append(generator.generate(texts, seeds).images_BHWC), device)
    shared = isinstance(generator.denoiser, SplitUNet)
    share = None if peak is None else count * _flop(pipeline, arguments.steps, shared=shared) / taken / peak
    return Timed(count / taken, share, made[0])


def _flop(pipeline: Any, steps: int, *, shared: bool) -> float:
    """FLOP of one guided image (2 per multiply-add): products and convolutions of denoiser and decoder."""
    config = pipeline.unet.config
    with torch.device("meta"):
        unet, vae = (type(one).from_config(one.config) for one in (pipeline.unet, pipeline.vae))
        latents = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size)
        text = torch.zeros(2, pipeline.tokenizer.model_max_length, config.cross_attention_dim)
        added = None
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.zeros(2, width), "time_ids": torch.zeros(2, 6)}
        timestep = torch.tensor(1)
    network = SplitUNet(unet) if shared and why_not(unet) is None else unet
    with FlopCounterMode(display=False) as step:
        network(latents, timestep, text, added_cond_kwargs=added, **call_options(network, 2, 0))
    with FlopCounterMode(display=False) as decoding:
        vae.decode(latents[:1])
    return float(steps * step.get_total_flops() + decoding.get_total_flops())


def levels(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of the images that both have, in levels of 255."""
    count = min(len(one), len(other))
    return float(np.abs(one[:count].astype(int) - other[:count].astype(int)).mean())


@dataclass(frozen=True)
class _Loop:
    rate: float
    scores: list[float]


def loop_of_prompts(pipeline: Any, arguments: argparse.Namespace, device: torch.device) -> _Loop:
    """Noise norms of prompts one after another: both captions encoded, both predictions in one call, the norm read."""
    scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler.config, where=arguments.model)
    x = first_input(scheduler, arguments.steps, bank_seeds(1), tuple(_noise(pipeline, 1).shape[1:])).to(device)
    timestep = scheduler.timesteps[0].to(device)
    scores: list[float] = []
    # Of two predictions of v, sqrt(alpha-bar) times their difference is that of the noises they mean.
    predicts_v = scheduler.config.prediction_type == "v_prediction"
    scale = float(scheduler.alphas_cumprod[timestep.cpu()]) ** 0.5 if predicts_v else 1.0

    def one(caption: str) -> None:
        text, empty, *pooled = pipeline.encode_prompt(
            prompt=caption, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        added = None
        if pooled:
            both = torch.cat([pooled[1], pooled[0]])
            side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
            added = {"text_embeds": both, "time_ids": size_ids(side, side, both).expand(2, -1)}
        rows = torch.cat([x, x]).to(text.dtype)
        out = pipeline.unet(rows, timestep, torch.cat([empty, text]), added_cond_kwargs=added).sample
        scores.append(scale * float(torch.linalg.vector_norm(out[1].float() - out[0].float())))

    texts = captions(arguments.screen_loop)
    one(texts[0])
    scores.clear()
    taken = seconds(lambda: [one(text) for text in texts], device)
    return _Loop(len(texts) / taken, scores)


def screened(pipeline: Any, arguments: argparse.Namespace, device: torch.device, loop: _Loop) -> dict[str, float]:
    generator = _generator(pipeline, arguments, device, arguments.screen_batch)
    screen = Screen(ScreenConfig(threshold=0.0, seeds=1), generator)
    texts = captions(arguments.screen)
    screen.scores(texts[: 2 * generator.batch_size])
    scores: list[float] = []
    rate = len(texts) / seconds(lambda: scores.extend(screen.scores(texts)), device)
    same = zip(scores, loop.scores, strict=False)
    return {
        "prompts_per_second": rate,
        "loop": loop.rate,
        "ratio": rate / loop.rate,
        "largest_difference": max(abs(one - other) / abs(other) for one, other in same),
    }


if __name__ == "__main__":
    main()
