"""The whole chain of one actor: where its time goes, and how busy it keeps the device.

The actor is the scan's own (`pipelines.scan.stages.Census`): sampling, segmentation, embedding of three views,
search, FB-Mem against about ten candidates, evidence. Its networks have random weights in the published sizes (SD, a
segmenter of BiRefNet's size, SSCD's ResNet-50); thresholds are so low that every generation is recorded with its
evidence, which is the most that coding can cost. With --small all but the denoiser are small, for a CPU.

One block is measured after some batches that compile, find sizes and fill the cache of references. Beside it: the same
with judging after sampling, not beside it; and a script that takes one generation after another through the stock
pipeline and the same judging. On a CPU "busy" is the process's CPU time a thread, of use on an idle machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks._machine import (
    PRECISIONS,
    add_arguments,
    captions,
    environment,
    prompt_table,
    seconds,
    settle,
    stock_pipeline,
)
from benchmarks._timeline import Timeline, busy, covered
from benchmarks.published import EmbedderSized, SegmenterSized, as_checkpoint
from memscan.config import CensusConfig
from memscan.index.store import write_index
from memscan.io.images import encode_png
from memscan.models.acceleration import Acceleration
from memscan.models.generator import Generator
from memscan.models.segmenter import TorchSegmenter
from memscan.models.specification import ModelSpec
from memscan.planted.renderer import Scene, random_background, random_object, render
from memscan.records import REFERENCES, REGIONS
from memscan.worker.classification import CopyClassifier
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generated import Generated
from memscan.worker.generation import GenerationWorker
from pipelines.ray.stage import StageSetup
from pipelines.scan.stages import Census, open_classifier

EMBEDDED = 288  # pixels, as SSCD's small edge


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """The settings of a measurement, from the command line's words."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--small", action="store_true", help="small segmenter, embedder and canvas")
    parser.add_argument("--probe", action="store_true", help="resources.probe_batch")
    parser.add_argument("--samples", type=int, default=4, help="generations a prompt")
    parser.add_argument("--prompts", type=int, default=0, help="of the block; default eight batches' worth")
    parser.add_argument("--references", type=int, default=200)
    parser.add_argument("--top-k", type=int, default=4, help="candidates of each of three views")
    parser.add_argument("--one-by-one", type=int, default=2, help="generations of the script")
    arguments = parser.parse_args(options)
    arguments.prompts = arguments.prompts or max(1, 8 * arguments.batch // arguments.samples)
    return arguments


def main(options: list[str] | None = None) -> None:
    arguments = parse(options)
    device = settle(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, device, Path(folder))
    print(f"{'part':12}{'seconds':>10}{'of the wall time':>18}")
    for name, value in result["seconds"].items():
        print(f"{name:12}{value:10.2f}{value / result['seconds']['wall']:18.1%}")
    print(
        f"denoiser {result['denoiser_of_busy']:.1%} of the busy time, device busy {result['busy']:.1%} of the wall time"
    )
    rates = ", ".join(f"{name} {value:.3f}" for name, value in result["images_per_second"].items())
    print(f"images/s: {rates}; {result['candidates']:.1f} candidates a generation")
    print(json.dumps(result))


def measure(arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    pipeline = stock_pipeline(arguments.model, folder, device, PRECISIONS[arguments.dtype])
    config = _config(arguments, folder)
    timeline = Timeline(device)
    encoder = _encoder(config, arguments, timeline)
    _write_references(arguments.references, encoder, folder / "index")
    plan = StageSetup(config, str(device), arguments.threads, str(folder / "index"))
    classifier = open_classifier(plan, encoder)
    script = _script(pipeline, arguments, encoder, classifier, device)  # before ours changes the network in place
    generator = Generator(
        as_checkpoint(pipeline), config.generator, acceleration=Acceleration.of(config.resources, device)
    )
    sampler = GenerationWorker(config, str(device), arguments.threads, generator, encoder)
    _watch(timeline, generator, encoder, classifier)
    stage = _ready(sampler, classifier, plan)
    table = prompt_table(captions(arguments.prompts))
    count = arguments.prompts * arguments.samples
    stage(table.slice(0, min(arguments.prompts, 2 * sampler.chunk)))
    timeline.clear()
    rows: list[pa.Table] = []
    active, wall = busy(lambda: rows.append(stage(table)), device)
    spans = timeline.spans()
    denoiser = covered(spans["denoiser"])
    overlapped = seconds(lambda: stage(table), device)  # without a profiler
    one_after_another = config.model_copy(update={"resources": config.resources.model_copy(update={"overlap": "off"})})
    serial = _ready(sampler, classifier, StageSetup(one_after_another, str(device), arguments.threads, plan.index))
    after = seconds(lambda: serial(table), device)
    sampled = seconds(lambda: generator.generate(_repeated(arguments), list(range(count))), device)
    made = [generation for row in rows[0]["generations"].to_pylist() for generation in row]
    rates = {"chain": count / overlapped, "judged after": count / after, "sampling alone": count / sampled}
    rates |= {"script": 1 / script}
    return {
        "benchmark": "chain",
        "settings": vars(arguments),
        "machine": environment(device),
        "seconds": {"wall": wall, "busy": active, **{name: covered(one) for name, one in sorted(spans.items())}},
        "denoiser_of_busy": denoiser / active,
        "denoiser_of_wall": denoiser / wall,
        "busy": active / wall,
        "generations": len(made),
        "candidates": float(np.mean([len(one["candidates"]) for one in made])),
        "with_evidence": sum(one["evidence"] is not None for one in made),
        "images_per_second": rates,
        "ratio": {name: rates["chain"] / rate for name, rate in rates.items() if name != "chain"},
    }


def _config(arguments: argparse.Namespace, folder: Path) -> CensusConfig:
    """The census that a user would configure, over networks that are made here."""
    small = arguments.small
    scripted = folder / "embedder.pt"
    network = EmbedderSized(small=small).eval()
    side = 64 if small else EMBEDDED
    with torch.inference_mode():
        torch.jit.trace(network, torch.rand(2, 3, side, side), check_trace=False).save(str(scripted))
    return CensusConfig.model_validate(
        {
            "prompts": {"paths": ["none"]},
            "generator": {
                "path": arguments.model,
                "samples": arguments.samples,
                "steps": arguments.steps,
                "guidance": arguments.guidance,
                "batch_size": arguments.batch,
                "dtype": arguments.dtype,
            },
            "segmenter": {
                "kind": "birefnet",
                "path": "random",
                "size": 64 if small else 1024,
                "dtype": arguments.dtype,
            },
            "embedder": {
                "path": str(scripted),
                "sha256": hashlib.sha256(scripted.read_bytes()).hexdigest(),
                "resize": "square",
                "size": side,
            },
            "index": {"path": "index", "top_k": arguments.top_k},
            "metric": {
                "variant": "region",
                "canvas": 128 if small else 512,
                "foreground_threshold": 1e-6,
                "background_threshold": 1e-6,
            },
            "resources": {
                "fast": arguments.fast,
                "compile": arguments.compile,
                "probe_batch": arguments.probe,
                "overlap": "on",
            },
        }
    )


def _encoder(config: CensusConfig, arguments: argparse.Namespace, timeline: Timeline) -> RegionEncoder:
    torch.manual_seed(0)
    network = SegmenterSized(small=arguments.small).eval().requires_grad_(False)
    spec = ModelSpec("segmenter", "random", "0" * 64, f"rembg{config.segmenter.size}")
    network.forward = timeline.wrap("segmenter", network.forward)  # type: ignore[method-assign]
    segmenter = TorchSegmenter(config.segmenter, arguments.device, network, spec)
    return RegionEncoder(config, arguments.device, arguments.threads, segmenter)


def _write_references(count: int, encoder: RegionEncoder, folder: Path) -> None:
    """An index of rendered scenes, described as references are."""
    rng = np.random.default_rng(0)
    scenes = (render(Scene(random_object(rng), random_background(rng)))[0] for _ in range(count))
    encoded = [encode_png(scene) for scene in scenes]
    described = [encoder([one])[0] for one in encoded]
    rows = [
        {"reference_id": f"r{at}", "image": image, "mask": mask}
        for at, (image, (mask, _)) in enumerate(zip(encoded, described, strict=True))
    ]
    vectors = {region: np.stack([one[1][at] for one in described]) for at, region in enumerate(REGIONS)}
    specs = encoder.embedder.spec, encoder.segmenter.spec
    write_index(str(folder), pa.Table.from_pylist(rows, schema=REFERENCES), vectors, "Flat", 1, *specs)


def _watch(timeline: Timeline, generator: Generator, encoder: RegionEncoder, classifier: CopyClassifier) -> None:
    generator.denoiser.forward = timeline.wrap("denoiser", generator.denoiser.forward)
    generator.decode = timeline.wrap("decoder", generator.decode)  # type: ignore[assignment]
    embedder: Any = encoder.embedder
    embedder.embed = timeline.wrap("embedder", embedder.embed)
    metric: Any = classifier.metric
    metric.prepare, metric.score = (timeline.wrap("metric", one) for one in (metric.prepare, metric.score))


def _ready(sampler: GenerationWorker, classifier: CopyClassifier, plan: StageSetup) -> Census:
    """The scan's actor over halves that are loaded."""

    class Ready(Census):
        @staticmethod
        def _load(plan: StageSetup) -> tuple[GenerationWorker, CopyClassifier]:
            return sampler, classifier

    return Ready(plan)


def _script(
    pipeline: Any,
    arguments: argparse.Namespace,
    encoder: RegionEncoder,
    classifier: CopyClassifier,
    device: torch.device,
) -> float:
    """Seconds a generation of the stock pipeline and the same judging, one after another."""

    def one(caption: str, steps: int) -> Sequence[Any]:
        image = pipeline(prompt=caption, num_inference_steps=steps, guidance_scale=arguments.guidance).images[0]
        pixels = np.array(image)
        masks = encoder.masks([pixels])
        vectors_RD = encoder.vectors([pixels], masks)[0]
        return classifier([[Generated(0, 0, pixels, {}, masks[0], vectors_RD)]])

    texts = captions(arguments.one_by_one + 1)
    one(texts[0], min(2, arguments.steps))
    return seconds(lambda: [one(text, arguments.steps) for text in texts[1:]], device) / arguments.one_by_one


def _repeated(arguments: argparse.Namespace) -> list[str]:
    return [one for one in captions(arguments.prompts) for _ in range(arguments.samples)]


if __name__ == "__main__":
    main()
