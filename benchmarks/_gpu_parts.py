"""The parts of `gpu_quick`: each measures one thing on one device and returns JSON values.

A part takes `Setting` and nothing else, frees what it made, and does the same at tiny sizes on a CPU (`rehearse`), so
that a rehearsal runs the very code that a GPU will run.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import chain, sampling
from benchmarks._machine import PRECISIONS, captions, matrix_peak, seconds, stock_pipeline
from benchmarks._roofline import H200, Peaks
from benchmarks.published import build_flow_pipeline
from memscan.config import CensusConfig, GeneratorConfig
from memscan.evaluation.sampling import MODES, PLAIN, Mode, compare_labels
from memscan.index.store import ReferenceIndex, write_index
from memscan.models.adapters import Adapter
from memscan.models.stock import StockGenerator
from memscan.planted.world import read_truth, shipped_world, world_config
from memscan.records import REFERENCES, REGIONS, prompt_id
from memscan.worker.classification import CopyClassifier
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generation import GenerationWorker
from memscan.worker.prompt import Prompt


@dataclass(frozen=True)
class Setting:
    """Where and at which size a part runs.

    Args:
        device: a GPU, or the CPU of a rehearsal.
        rehearse: tiny sizes and few steps.
        peaks: of the device, as measured by the part `peak`; those of an H200 until then.
    """

    device: torch.device
    rehearse: bool
    peaks: Peaks = H200

    @property
    def dtype(self) -> str:
        """Precision of the networks."""
        return "float32" if self.rehearse else "bfloat16"

    def of(self, gpu: Any, rehearsal: Any) -> Any:
        """A size: one for the GPU, one for a rehearsal."""
        return rehearsal if self.rehearse else gpu


def peak(setting: Setting) -> dict[str, Any]:
    """Measure the matrix peak and the copy bandwidth of the device."""
    flops = matrix_peak(setting.device, PRECISIONS[setting.dtype], repeats=setting.of(5, 1))
    source = torch.ones(setting.of(2**30, 2**22), dtype=torch.float32, device=setting.device)
    target = torch.empty_like(source)
    target.copy_(source)
    calls = setting.of(20, 3)
    taken = seconds(lambda: [target.copy_(source) for _ in range(calls)], setting.device)
    return {"flops": flops, "bandwidth": 2 * source.numel() * source.element_size() * calls / taken}


def sd1(setting: Setting) -> dict[str, Any]:
    """Sample SD 1.x at 512 pixels: stock one by one, stock batched, ours eager, ours with CUDA graphs."""
    return _sampled(
        setting, setting.of("sd1", "tiny"), batch=setting.of(16, 2), ways=setting.of(("off", "graphs"), ("off",))
    )


def xl(setting: Setting) -> dict[str, Any]:
    """Sample SD XL at 1024 pixels: ours against stock."""
    return _sampled(
        setting, setting.of("xl", "tiny-xl"), batch=setting.of(8, 2), ways=("off",), one_by_one=setting.of(2, 1)
    )


def inductor(setting: Setting) -> dict[str, Any]:
    """Sample SD 1.x with a compiled denoiser; a CPU's rehearsal runs it eagerly, since compiling takes minutes."""
    ways = setting.of(("inductor",), ("off",))
    return _sampled(setting, setting.of("sd1", "tiny"), batch=setting.of(16, 2), ways=ways, one_by_one=setting.of(1, 1))


def screen(setting: Setting) -> dict[str, Any]:
    """Screen prompts by one denoiser call per seed, against a loop over prompts."""
    words = ["--model", setting.of("sd1", "tiny"), "--screen", str(setting.of(1024, 8))]
    words += ["--screen-batch", str(setting.of(64, 2)), "--screen-loop", str(setting.of(32, 2))]
    arguments = _settled(setting, sampling.parse(words))
    with _pipeline(setting, arguments.model) as pipeline:
        loop = sampling.loop_of_prompts(pipeline, arguments, setting.device)
        found: dict[str, Any] = sampling.screened(pipeline, arguments, setting.device, loop)
    return found


def whole_chain(setting: Setting) -> dict[str, Any]:
    """Run the actor of a scan: sampling, segmentation at 1024 pixels, embedding, search, FB-Mem."""
    words = [
        "--model",
        setting.of("sd1", "tiny"),
        "--batch",
        str(setting.of(16, 2)),
        "--references",
        str(setting.of(100, 9)),
    ]
    words += ["--prompts", str(setting.of(16, 2)), "--samples", str(setting.of(4, 2)), "--one-by-one", "1"]
    arguments = _settled(setting, chain.parse([*words, *(["--small"] if setting.rehearse else [])]))
    with tempfile.TemporaryDirectory() as folder:
        found = chain.measure(arguments, setting.device, Path(folder))
    return {key: found[key] for key in ("denoiser_of_busy", "busy", "images_per_second", "ratio", "candidates")}


def exactness(setting: Setting) -> dict[str, Any]:
    """Compare images of our loop with the stock pipeline's, in every precision and with CUDA graphs.

    Mean absolute differences in levels of 255, on the shipped planted checkpoint; what the tests marked `gpu` guard:
    at most .5 in float32, 2 in half precision.
    """
    found: dict[str, Any] = {}
    precisions = setting.of(("float32", "bfloat16", "float16"), ("float32",))
    for dtype in precisions:
        words = [
            "--model",
            "planted",
            "--batch",
            "4",
            "--images",
            "4",
            "--steps",
            str(setting.of(50, 2)),
            "--dtype",
            dtype,
        ]
        for way in setting.of(("off", "graphs"), ("off",)):
            arguments = _settled(setting, sampling.parse([*words, "--compile", way]), dtype)
            with _pipeline(setting, "planted", dtype) as pipeline:
                stock = sampling.stock(pipeline, arguments, setting.peaks.flops, 4, 4)
                ours = sampling.ours(pipeline, arguments, setting.device, None)
            limit = 0.5 if dtype == "float32" else 2.0
            levels = sampling.levels(ours.images_BHWC, stock.images_BHWC)
            found[f"{dtype} {way}"] = {"levels": levels, "limit": limit, "holds": levels <= limit}
    return found


def flow(setting: Setting) -> dict[str, Any]:
    """Sample a flow transformer of the size of SD3 medium by the stock adapter, and prompt by prompt."""
    steps, batch = setting.of(28, 2), setting.of(8, 2)
    name = setting.of("sd3", "tiny-flow")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        pipeline = build_flow_pipeline(name, Path(folder), device=str(setting.device), dtype=PRECISIONS[setting.dtype])
        config = GeneratorConfig(
            path=name, steps=steps, guidance=7.0, batch_size=batch, dtype=setting.dtype, adapter="stock"
        )
        adapter = Adapter("stock", type(pipeline).__name__, type(pipeline.scheduler).__name__, (), False, "velocity")
        generator = StockGenerator(pipeline, config, adapter)
        texts = captions(2 * batch)
        generator.generate(texts[:batch], list(range(batch)))
        ours = seconds(lambda: generator.generate(texts, list(range(2 * batch))), setting.device)
        singles = texts[: setting.of(2, 1)]
        alone = seconds(
            lambda: [pipeline(prompt=one, num_inference_steps=steps, guidance_scale=7.0) for one in singles],
            setting.device,
        )
    rates = {"stock adapter": 2 * batch / ours, "one by one": len(singles) / alone}
    return {"images_per_second": rates, "ratio": rates["stock adapter"] / rates["one by one"]}


def verdicts(setting: Setting) -> dict[str, Any]:
    """Classify the planted world's generations in half precisions, and count how many verdicts are those of float32."""
    truth = read_truth().to_pylist()[:: setting.of(1, 90)]
    config = world_config()
    threads = torch.get_num_threads()
    prompts = [Prompt(prompt_id(row["caption"]), row["caption"]) for row in truth]
    encoder = RegionEncoder(config, str(setting.device), threads)
    with tempfile.TemporaryDirectory() as folder:
        _index_of(truth, encoder, folder, setting.of(300, 2), setting.of(None, 2))
        index = ReferenceIndex.open(folder, encoder.embedder.spec)
        classifier = CopyClassifier(config, index, encoder, str(setting.device))

        def labels(mode: Mode) -> dict[tuple[str, int], str]:
            worker = GenerationWorker(_changed(config, mode), str(setting.device), threads, encoder=encoder)
            records = classifier(worker(prompts))
            return {
                (prompt.prompt_id, one["sample"]): one["label"]
                for prompt, row in zip(prompts, records, strict=True)
                if isinstance(row, list)
                for one in row
            }

        plain = labels(PLAIN)
        names = setting.of(("bfloat16", "float16"), ("bfloat16",))
        return {name: compare_labels(plain, labels(MODES[name])) for name in names}


def faiss_gpu(setting: Setting) -> dict[str, Any]:
    """Search half a million vectors with FAISS on the GPU, against FAISS on the CPU of the same machine."""
    import faiss

    if not setting.rehearse and not getattr(faiss, "get_num_gpus", lambda: 0)():
        return {"skipped": "the installed FAISS has no GPU support (the wheel of faiss-gpu has 135 MB)"}
    rows, queries = setting.of((500_000, 1_000), (2_000, 10))
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((rows, 512), dtype=np.float32)
    flat = faiss.IndexFlatIP(512)
    flat.add(vectors)
    cpu = seconds(lambda: flat.search(vectors[:queries], 5), setting.device)
    if setting.rehearse:
        return {"queries_per_second": {"cpu": queries / cpu}}
    moved = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)
    moved.search(vectors[:queries], 5)
    gpu = seconds(lambda: moved.search(vectors[:queries], 5), setting.device)
    return {"queries_per_second": {"cpu": queries / cpu, "gpu": queries / gpu}, "ratio": cpu / gpu}


PARTS: dict[str, tuple[Callable[[Setting], dict[str, Any]], float]] = {
    # name: the part, and the most seconds that it may take on a GPU; in the order of worth
    "peak": (peak, 20),
    "sd1": (sd1, 80),
    "screen": (screen, 40),
    "chain": (whole_chain, 100),
    "exactness": (exactness, 40),
    "xl": (xl, 80),
    "flow": (flow, 50),
    "verdicts": (verdicts, 60),
    "faiss_gpu": (faiss_gpu, 20),
    "inductor": (inductor, 120),
}


def _sampled(
    setting: Setting, model: str, *, batch: int, ways: tuple[str, ...], one_by_one: int | None = None
) -> dict[str, Any]:
    words = ["--model", model, "--batch", str(batch), "--steps", str(setting.of(50, 2)), "--screen", "0"]
    arguments = _settled(setting, sampling.parse(words))
    count = one_by_one or setting.of(4, 1)
    with _pipeline(setting, model) as pipeline:
        timed = {
            "one by one": sampling.stock(pipeline, arguments, setting.peaks.flops, 1, count),
            "batched": sampling.stock(pipeline, arguments, setting.peaks.flops, batch, arguments.images),
        }
        for way in ways:
            arguments.compile = way
            timed[f"ours {way}"] = sampling.ours(pipeline, arguments, setting.device, setting.peaks.flops)
    best = max((name for name in timed if name.startswith("ours")), key=lambda name: timed[name].rate)
    found: dict[str, Any] = {
        "images_per_second": {name: one.rate for name, one in timed.items()},
        "share_of_peak": {name: one.share for name, one in timed.items()},
        "levels_from_stock": sampling.levels(timed[best].images_BHWC, timed["batched"].images_BHWC),
        "ratio": {name: timed[best].rate / timed[name].rate for name in ("one by one", "batched")},
        "best": best,
    }
    if setting.device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(setting.device) / 2**30
    return found


def _settled(setting: Setting, arguments: argparse.Namespace, dtype: str | None = None) -> argparse.Namespace:
    arguments.device, arguments.dtype = str(setting.device), dtype or setting.dtype
    arguments.threads = torch.get_num_threads()
    if setting.rehearse:
        arguments.steps = min(arguments.steps, 2)
    return arguments


@contextmanager
def _pipeline(setting: Setting, model: str, dtype: str | None = None) -> Iterator[Any]:
    """A stock pipeline made on the device, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        yield stock_pipeline(model, Path(folder), setting.device, PRECISIONS[dtype or setting.dtype])


def _index_of(
    truth: list[dict[str, Any]], encoder: RegionEncoder, folder: str, others: int, originals: int | None
) -> None:
    """An index of the planted originals of these prompts (of each so many, None: all), and of other training images."""
    table = pq.read_table(shipped_world() / "references.parquet").to_pylist()
    wanted = {name for row in truth for name in row["reference_ids"][:originals]}
    taken = [row for row in table if row["reference_id"] in wanted]
    taken += [row for row in table if row["reference_id"] not in wanted][:others]
    described = encoder([row["image"] for row in taken])
    good = [(row, one) for row, one in zip(taken, described, strict=True) if isinstance(one, tuple)]
    rows = [{"reference_id": row["reference_id"], "image": row["image"], "mask": one[0]} for row, one in good]
    vectors = {region: np.stack([one[1][at] for _, one in good]) for at, region in enumerate(REGIONS)}
    specs = encoder.embedder.spec, encoder.segmenter.spec
    write_index(folder, pa.Table.from_pylist(rows, schema=REFERENCES), vectors, "Flat", 1, *specs)


def _changed(config: CensusConfig, mode: Mode) -> CensusConfig:
    data = config.model_dump()
    for change in (PLAIN, mode):
        data["generator"] |= change.generator
        data["resources"] |= change.resources
    return CensusConfig.model_validate(data)


def release(setting: Setting) -> None:
    """Give back what a part left on the device, and forget its peak."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)


def with_peaks(setting: Setting, found: dict[str, Any]) -> Setting:
    """The setting with the peaks that were measured."""
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    return replace(setting, peaks=Peaks(found["flops"], found["bandwidth"], name))
