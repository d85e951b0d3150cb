"""Synthetic runs for benchmarks and tests: run folders as a scan leaves them, of any size, without a model.

Parts, blocks (one file each, of as many rows as a scan's), commit records, candidates of every generation, evidence of
memorised ones only, localisation maps and rejects are there; everything goes through the run folder code of the scan.
One prompt in twenty is flagged, in topics of about a hundred whose captions share words and training images; of the
others, one in forty has one memorised generation, too few to be flagged.
"""

from __future__ import annotations

import functools
import io
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from memscan.census.clusters.vectors import unit
from memscan.index import write_index
from memscan.models.specification import ModelSpec
from memscan.planted.world import world_config
from memscan.prompts.table import PromptTable
from memscan.records import CENSUS, GENERATION, PROMPTS, REFERENCES, REGIONS, prompt_id
from pipelines.run_folder.runs import Run

SAMPLES = 4
FLAGGED_EVERY = 20
TOPIC = 100  # flagged prompts
PART = 10_000
BLOCK = 16  # rows of a file: resources.prompts_per_block
REFERENCES_COUNT = 5000
PICTURES = 64
WORDS = "harbour poster door fox mountain lamp bicycle garden castle river violin tower"
NOUNS = tuple(WORDS.split())
LABELS = np.array(["VM", "FM", "BM"])


def write_synthetic_run(folder: Path, rows: int, *, block: int = BLOCK, processes: int = 1) -> Path:
    """A complete run of `rows` prompts in `folder`; `rows // 20` of them are flagged."""
    config = world_config(None, out=str(folder)).model_copy(update={"part_size": PART, "name": f"synthetic-{rows}"})
    run = Run.open(config, {"models.generator": "generator:synthetic@0123456789ab:64 px"})
    starts = range(0, rows, PART)
    prompts = pa.concat_tables(_prompts(start, min(PART, rows - start)) for start in starts)
    run.write_prompts(PromptTable(prompts, rows, ()), PART)
    run.set_index(str(folder / "index"), _write_references(folder / "index"))
    work = [(str(folder), number, start, min(PART, rows - start), block) for number, start in enumerate(starts)]
    if processes == 1:
        for one in work:
            _write_part(one)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write_part, work))
    Run.load(str(folder)).finish()
    return folder


def _write_part(work: tuple[str, int, int, int, int]) -> None:
    folder, number, start, count, block = work
    run = Run.load(folder)
    target = Path(run.folder.census_part(number))
    target.mkdir(parents=True)
    rows = _rows(start, count)
    for at in range(0, count, block):
        pq.write_table(rows.slice(at, block), target / f"{number:05}_{at:06}-0.parquet")
    run.commit(number)


def _prompts(start: int, count: int) -> pa.Table:
    captions = [_caption(number) for number in range(start, start + count)]
    columns: dict[str, Any] = {
        "prompt_id": [prompt_id(caption) for caption in captions],
        "caption": captions,
        "count": [1] * count,
        "source": ["prompts.csv"] * count,
        "row": range(start + 1, start + count + 1),
        "status": ["done"] * count,
    }
    return pa.table({name: columns.get(name, [None] * count) for name in PROMPTS.names}, schema=PROMPTS)


def _caption(number: int) -> str:
    if number % FLAGGED_EVERY:
        return f"an ordinary caption, number {number}"
    topic = number // (FLAGGED_EVERY * TOPIC)
    words = [NOUNS[(topic * 7 + place * (topic + 3)) % len(NOUNS)] for place in range(3)]
    return f"{' '.join(words)} topic{topic} print {number}"


def _rows(start: int, count: int) -> pa.Table:
    numbers = np.arange(start, start + count)
    failed = [one % 500 == 7 for one in range(start, start + count)]
    columns: dict[str, Any] = dict(zip(PROMPTS.names, _prompts(start, count).columns, strict=True))
    columns |= {
        "status": ["rejected" if one else "done" for one in failed],
        "reason": ["generation_not_finite" if one else None for one in failed],
        "message": ["the latents are not finite" if one else None for one in failed],
        "generations": _generations(np.random.default_rng(start), numbers, np.where(failed, 0, SAMPLES)),
    }
    return pa.table({name: columns.get(name, [None] * count) for name in CENSUS.names}, schema=CENSUS)


def _generations(rng: np.random.Generator, numbers: np.ndarray, sizes: np.ndarray) -> pa.Array:
    flagged = numbers % FLAGGED_EVERY == 0
    hits = np.where(flagged, 2 + numbers // FLAGGED_EVERY % 3, numbers % 41 == 1)
    sample = np.concatenate([np.arange(size) for size in sizes])
    hit = sample < np.repeat(hits, sizes)
    topic = np.repeat(numbers // (FLAGGED_EVERY * TOPIC), sizes)
    count = len(sample)
    label = np.where(hit, LABELS[(topic + (rng.random(count) < 0.1)) % 3], "NM")
    low, high = rng.uniform(0.1, 0.5, count), rng.uniform(0.85, 0.99, count)
    ids = pa.array([f"ref-{one}" for one in (topic * 3 + rng.integers(0, 3, count)) % REFERENCES_COUNT])
    pixels, masks, maps = (pa.array(_pictures(mode)) for mode in ("RGB", "L", "L"))
    drawn = rng.integers(0, PICTURES, count)
    evidence = [pixels.take(pa.array(drawn)), masks.take(pa.array(drawn))]
    columns: dict[str, Any] = {
        "sample": sample,
        "seed": rng.integers(0, 2**62, count),
        "label": label,
        "foreground": np.where(np.isin(label, ["VM", "FM"]), high, low),
        "background": np.where(np.isin(label, ["VM", "BM"]), high, low),
        "whole": low,
        "match_id": ids,
        "foreground_area": np.full(count, 0.2),
        "similarity": low,
        "noise_norm": rng.uniform(1, 10, count),
        "noise_norm_first": rng.uniform(1, 10, count),
        "candidates": _candidates(rng, ids),
        "evidence": pa.StructArray.from_arrays(
            evidence, fields=list(GENERATION.field("evidence").type), mask=pa.array(~hit)
        ),
        "signals": pa.array(
            [[("one_step_norm", value)] for value in (hit + rng.random(count)).tolist()],
            GENERATION.field("signals").type,
        ),
        "localization": maps.take(pa.array(drawn, mask=~hit)),
        "localized_foreground": pa.array(rng.random(count), mask=~hit),
    }
    arrays = [
        pa.array(columns[field.name]).cast(field.type) if field.name in columns else pa.nulls(count, field.type)
        for field in GENERATION
    ]
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, fields=list(GENERATION)))


def _candidates(rng: np.random.Generator, ids: pa.Array) -> pa.Array:
    """Two a generation."""
    fields = list(GENERATION.field("candidates").type.value_type)
    twice = pa.concat_arrays([ids, ids])
    words = {"reference_id": twice, "found_by": ["whole"] * len(twice), "label": ["NM"] * len(twice)}
    columns = [pa.nulls(len(twice)) if f.nullable else words.get(f.name, rng.random(len(twice))) for f in fields]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, fields, strict=True)]
    offsets = pa.array(np.arange(0, len(twice) + 1, 2), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, fields=fields))


@functools.cache
def _pictures(mode: str) -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    return tuple(_picture(rng, mode) for _ in range(PICTURES))


def _picture(rng: np.random.Generator, mode: str) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    coarse.convert(mode).save(sink, "PNG")
    return sink.getvalue()


def _write_references(folder: Path) -> Any:
    rng = np.random.default_rng(1)
    rows = [
        {
            "reference_id": f"ref-{number}",
            "url": f"https://example.org/{number}.jpg",
            "image": _picture(rng, "RGB"),
            "mask": _pictures("L")[number % PICTURES],
        }
        for number in range(REFERENCES_COUNT)
    ]
    vectors = unit(rng.normal(size=(REFERENCES_COUNT, 8)))
    specs = [ModelSpec(role, "synthetic", "ba98765432100123", "64 px") for role in ("embedder", "segmenter")]
    table = pa.Table.from_pylist(rows, schema=REFERENCES)
    return write_index(str(folder), table, dict.fromkeys(REGIONS, vectors), "Flat", 1, *specs)
