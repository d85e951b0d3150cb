"""A SYNTHETIC generator, segmenter and embedder: cheap functions where networks stand, so that the rest is measured.

Everything around them is the product's own: reading, parts, Ray, `GenerationWorker`, the index search, FB-Mem, records,
Parquet, commits. A prompt "print K" is answered with reference K, any other with noise from its seed; the segmenter
answers with a disc, the embedder with 4x4 means of the pixels. `install` is Ray's `worker_process_setup_hook`.

Environment: SYNTHETIC_MS, milliseconds that a generation sleeps; SYNTHETIC_READY, a folder where every worker leaves
the time at which it was ready; SYNTHETIC_BARE=1, no index and no metric either: nothing but the sleep, and the folder
gets the time of every worker's first block.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SIDE = 32
POOL = 4
REFERENCES = 2000
# One prompt in so many is memorised.
PRINT_EVERY = 50


def captions(count: int) -> list[str]:
    """Distinct prompts; every `PRINT_EVERY`th one is memorised."""
    return [
        f"print {(number // PRINT_EVERY) % REFERENCES} of a thing, number {number}"
        if number % PRINT_EVERY == 0
        else f"an ordinary caption, number {number}"
        for number in range(count)
    ]


def install() -> None:
    """Put the synthetic models where `Census` (pipelines/scan/stages.py) loads its own; torch waits for a worker."""
    from pipelines.scan.stages import Census

    real = Census._load

    def load(plan: Any) -> Any:
        if os.environ.get("SYNTHETIC_BARE") == "1":
            return _bare()
        work = _around(real, plan)
        _note_time()
        return work

    Census._load = staticmethod(load)  # type: ignore[method-assign]


def _note_time() -> None:
    if folder := os.environ.get("SYNTHETIC_READY"):
        (Path(folder) / secrets.token_hex(6)).write_text(str(time.time()))


def ready_times(folder: Path) -> list[float]:
    """When each worker was ready, seconds since the epoch, sorted."""
    return sorted(float(file.read_text()) for file in folder.iterdir())


def _around(load: Any, plan: Any) -> Any:
    from memscan.worker import generation as work

    work.load_adapter = lambda config, device: SyntheticGenerator(config.generator)  # type: ignore[assignment]
    work.RegionEncoder = lambda config, device, threads: SyntheticRegionEncoder()  # type: ignore[assignment,misc]
    return load(plan)


class SyntheticGenerator:
    """Stands for `memscan.models.generator.Generator`."""

    def __init__(self, config: Any) -> None:
        self.config, self.batch_size, self.calls = config, config.batch_size, 0
        self._sleep = float(os.environ.get("SYNTHETIC_MS", "0")) / 1000

    def generate(self, captions: Sequence[str], seeds: Sequence[int], first: Any = None) -> Any:
        from memscan.models.generator import Generations

        if self._sleep:
            time.sleep(self._sleep * len(captions))
        images = [_answer(caption, seed) for caption, seed in zip(captions, seeds, strict=True)]
        norms = np.full(len(images), 1.0, np.float32)
        return Generations(np.stack(images), {"noise_norm": norms}, np.ones(len(images), np.bool_))


class SyntheticRegionEncoder:
    """Stands for `memscan.worker.encoder.RegionEncoder`."""

    def __init__(self) -> None:
        from memscan.models.specification import ModelSpec

        self.embedder = SimpleNamespace(spec=ModelSpec("embedder", "synthetic", "0" * 64, f"{SIDE} px"))
        self.segmenter = SimpleNamespace(spec=ModelSpec("segmenter", "synthetic", "0" * 64, f"{SIDE} px"))
        y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
        self._mask = (x**2 + y**2 < (SIDE / 4) ** 2).astype(np.float32)

    def masks(self, images: Sequence[Any]) -> list[Any]:
        return [self._mask] * len(images)

    def vectors(self, images: Sequence[Any], masks: Sequence[Any]) -> Any:
        stacked, mask = np.stack(images).astype(np.float32) - 127.5, np.stack(masks)[..., None]
        views = np.stack([stacked, stacked * mask, stacked * (1 - mask)], axis=1)
        step = SIDE // POOL
        pooled = views.reshape(len(images), 3, POOL, step, POOL, step, 3).mean(axis=(3, 5)).reshape(len(images), 3, -1)
        return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)


def write_references(folder: str) -> None:
    """The index of the references that memorised prompts are answered with."""
    import pyarrow as pa

    from memscan.index.store import write_index
    from memscan.io.images import encode_mask, encode_png
    from memscan.records import REFERENCES as SCHEMA
    from memscan.records import REGIONS

    encoder = SyntheticRegionEncoder()
    images = [_reference(number) for number in range(REFERENCES)]
    vectors_NRD = encoder.vectors(images, encoder.masks(images))
    mask = encode_mask(encoder.masks([0])[0])
    rows = [
        {"reference_id": f"ref-{number}", "image": encode_png(image), "mask": mask}
        for number, image in enumerate(images)
    ]
    vectors = {region: np.ascontiguousarray(vectors_NRD[:, at]) for at, region in enumerate(REGIONS)}
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_index(folder, table, vectors, "Flat", 1, encoder.embedder.spec, encoder.segmenter.spec)


def _answer(caption: str, seed: int) -> Any:
    if caption.startswith("print "):
        return _reference(int(caption.split(maxsplit=2)[1]))
    return _noise(seed)


def _reference(number: int) -> Any:
    return _noise(1_000_000_007 + number)


def _noise(seed: int) -> Any:
    coarse = np.random.default_rng(seed).integers(0, 256, (SIDE // 2, SIDE // 2, 3), dtype=np.uint8)
    return coarse.repeat(2, axis=0).repeat(2, axis=1)


def _bare() -> Any:
    """A sampler and a classifier that only take time: a stage for many workers on few cores, without torch."""
    milliseconds = float(os.environ.get("SYNTHETIC_MS", "0"))
    blocks = itertools.count()

    def draft(prompts: Sequence[Any], samples: range | None = None) -> list[Any]:
        if next(blocks) == 0:
            _note_time()
        time.sleep(milliseconds / 1000 * len(prompts))
        return [[] for _ in prompts]

    generator = SimpleNamespace(calls=0)
    sampler = SimpleNamespace(
        generator=generator, screen=list, spans=[range(1)], chunk=1, draft=draft, describe=lambda drafts: drafts
    )
    return sampler, lambda rows: list(rows)
