"""Seconds and driver memory of `memscan reduce` over synthetic censuses, beside a loop over the rows in one process.

Rows are written as the scan writes them (parts, commit records, candidates, evidence of memorised generations only);
one prompt in twenty is flagged, in clusters of about a hundred whose captions share words and training images. Every
reduce runs in a process of its own, so that its peak resident memory is the driver's; workers of Ray are not in it.

The loop is what a script without memscan would do: read the files as a table, judge each row in turn, list the flagged
ones. It makes no clusters, no groups of near-duplicates and no report, so the ratio is of judging alone (--loop rows).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from memscan.clustering.vectors import unit
from memscan.index import write_index
from memscan.models.specification import ModelSpec
from memscan.planted.world import world_config
from memscan.prompts import PromptTable
from memscan.records import CENSUS, GENERATION, PROMPTS, REFERENCES, REGIONS, prompt_id
from pipelines.runs import Run

SAMPLES = 4
FLAGGED_SHARE = 0.05
CLUSTER = 100
PART = 10_000
REFERENCES_COUNT = 5000
NOUNS = (
    "harbour",
    "poster",
    "door",
    "fox",
    "mountain",
    "lamp",
    "bicycle",
    "garden",
    "castle",
    "river",
    "violin",
    "tower",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--loop", type=int, default=100_000, help="rows of the plain loop; 0 leaves it out")
    parser.add_argument("--folder", default=None, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--child", choices=("reduce", "judge", "loop"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.child, Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        figures = {rows: _measure(folder / str(rows), rows) for rows in arguments.rows}
        loop = _loop(folder, arguments.loop) if arguments.loop else None
    print(f"{'rows':>10}{'flagged':>10}{'seconds':>10}{'driver CPU s':>14}{'driver MiB':>12}{'report MiB':>12}")
    for rows, row in figures.items():
        print(
            f"{rows:10,}{row['flagged']:10,}{row['seconds']:10.1f}{row['cpu_seconds']:14.1f}{row['mebibytes']:12.0f}{row['report_mebibytes']:12.1f}"
        )
    slope = _slope({rows: row["seconds"] for rows, row in figures.items()})
    if slope is not None:
        print(f"log-log slope of seconds against rows: {slope:.2f}")
    if loop:
        print(f"judging {arguments.loop:,} rows: {loop['ours']:.1f} s here, {loop['loop']:.1f} s in a loop")
    result = {"benchmark": "reduce", "settings": vars(arguments), "figures": figures, "slope": slope, "judging": loop}
    print(json.dumps(result | {"ratio": loop["loop"] / loop["ours"] if loop else None}))


def _slope(seconds: dict[int, float]) -> float | None:
    if len(seconds) < 2:
        return None
    return float(
        np.polyfit([math.log(rows) for rows in seconds], [math.log(value) for value in seconds.values()], 1)[0]
    )


def _measure(folder: Path, rows: int) -> dict[str, Any]:
    if not (folder / "run.json").exists():
        write_run(folder, rows)
    return _run_child("reduce", folder)


def _loop(folder: Path, rows: int) -> dict[str, float]:
    run = folder / str(rows)
    if not (run / "run.json").exists():
        write_run(run, rows)
    return {"ours": _run_child("judge", run)["seconds"], "loop": _run_child("loop", run)["seconds"]}


def _run_child(kind: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.reduce", "--child", kind, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(kind: str, folder: Path) -> None:
    import pipelines.reduce  # importing is not what is measured

    started, worked = time.perf_counter(), time.process_time()
    if kind == "reduce":
        flagged = pipelines.reduce.reduce_run(str(folder))["counts"]["flagged"]
    else:
        flagged = _judged(folder) if kind == "judge" else _judged_in_a_loop(folder)
    seconds = time.perf_counter() - started
    cpu = time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    page = folder / "report.html"
    size = page.stat().st_size / 2**20 if page.exists() else 0.0
    print(
        json.dumps(
            {"flagged": flagged, "seconds": seconds, "cpu_seconds": cpu, "mebibytes": peak, "report_mebibytes": size}
        )
    )


def _judged(folder: Path) -> int:
    from pipelines.judging import judge_files
    from pipelines.results import census_files

    run = Run.load(str(folder))
    config = run.config()
    return judge_files(run, census_files(run, False), config.verdict, config.metric, False)[1].num_rows


def _judged_in_a_loop(folder: Path) -> int:
    from memscan.census import verdict

    config = Run.load(str(folder)).config()
    rows = pq.read_table(folder / "census").to_pylist()
    return sum(verdict(row["generations"], config.verdict, config.metric).flagged for row in rows)


def write_run(folder: Path, rows: int) -> None:
    """A complete run of `rows` prompts."""
    rng = np.random.default_rng(0)
    config = world_config(None, out=str(folder)).model_copy(update={"part_size": PART, "name": f"synthetic-{rows}"})
    run = Run.open(config, {"models.generator": "generator:synthetic@0123456789ab:64 px"})
    parts = [_part(rng, start, min(PART, rows - start)) for start in range(0, rows, PART)]
    prompts = pa.concat_tables(part.select(PROMPTS.names) for part in parts)
    run.write_prompts(PromptTable(prompts.cast(PROMPTS), rows, ()), PART)
    run.set_index(str(folder / "index"), _write_references(folder / "index", rng))
    for number, part in zip(run.parts, parts, strict=True):
        target = Path(run.folder.census_part(number))
        target.mkdir(parents=True)
        for at in range(0, part.num_rows, PART // 4):
            pq.write_table(part.slice(at, PART // 4), target / f"{at:06}.parquet")
        run.commit(number)
    run.finish()


def _part(rng: np.random.Generator, start: int, rows: int) -> pa.Table:
    numbers = np.arange(start, start + rows)
    flagged = numbers % round(1 / FLAGGED_SHARE) == 0
    cluster = numbers // round(CLUSTER / FLAGGED_SHARE)
    captions = [
        _caption(int(number), int(topic), hit) for number, topic, hit in zip(numbers, cluster, flagged, strict=True)
    ]
    columns = {
        "prompt_id": [prompt_id(caption) for caption in captions],
        "caption": captions,
        "count": np.ones(rows, np.int64),
        "source": pa.repeat(pa.scalar("prompts.csv"), rows),
        "row": numbers + 1,
        "url": pa.nulls(rows, pa.string()),
        "status": pa.repeat(pa.scalar("done"), rows),
        "reason": pa.nulls(rows, pa.string()),
        "message": pa.nulls(rows, pa.string()),
        "generations": _generations(rng, flagged, cluster),
        "decision": pa.nulls(rows, pa.string()),
        "screen_score": pa.nulls(rows, pa.float32()),
        "weight": pa.nulls(rows, pa.float64()),
    }
    return pa.table(columns, schema=CENSUS)


def _caption(number: int, topic: int, flagged: bool) -> str:
    words = [NOUNS[(topic * 7 + place * (topic + 3)) % len(NOUNS)] for place in range(3)]
    return f"{' '.join(words)} topic{topic} print {number}" if flagged else f"an ordinary caption, number {number}"


def _generations(rng: np.random.Generator, flagged: np.ndarray, cluster: np.ndarray) -> pa.Array:
    count = len(flagged) * SAMPLES
    hit = np.repeat(flagged, SAMPLES)
    label = np.where(hit, np.repeat(np.array(["VM", "FM", "BM"])[cluster % 3], SAMPLES), "NM")
    low, high = rng.uniform(0.1, 0.5, count), rng.uniform(0.85, 0.99, count)
    match = (np.repeat(cluster, SAMPLES) * 3 + rng.integers(0, 3, count)) % REFERENCES_COUNT
    ids = pa.array([f"ref-{number}" for number in match])
    columns: dict[str, Any] = {
        "sample": np.tile(np.arange(SAMPLES), len(flagged)),
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
        "candidates": _candidates(ids),
        "evidence": pa.array([{"generation": _PIXELS, "generation_mask": _MASK} if one else None for one in hit]),
        "signals": pa.array([[("one_step_norm", 1.0 + one)] for one in hit.tolist()], GENERATION.field("signals").type),
        "localization": pa.nulls(count, pa.binary()),
        "localized_foreground": pa.nulls(count, pa.float32()),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in GENERATION]
    offsets = pa.array(np.arange(0, count + 1, SAMPLES), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, fields=list(GENERATION)))


def _candidates(ids: pa.Array) -> pa.Array:
    """Two a generation, as alike as they are in no run: their size on disk is what counts."""
    fields = list(CENSUS.field("generations").type.value_type.field("candidates").type.value_type)
    twice = pa.concat_arrays([ids, ids])
    plain = {"reference_id": twice, "found_by": pa.repeat(pa.scalar("whole"), len(twice)), "label": None}
    scores = pa.array(np.linspace(0, 1, len(twice)), pa.float32())
    plain["label"] = pa.repeat(pa.scalar("NM"), len(twice))
    arrays = [plain.get(field.name, scores) for field in fields]
    offsets = pa.array(np.arange(0, len(twice) + 1, 2), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, fields=fields))


def _picture(rng: np.random.Generator, mode: str = "RGB") -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    coarse.convert(mode).save(sink, "PNG")
    return sink.getvalue()


_PIXELS, _MASK = _picture(np.random.default_rng(1)), _picture(np.random.default_rng(2), "L")


def _write_references(folder: Path, rng: np.random.Generator) -> Any:
    rows = [
        {
            "reference_id": f"ref-{number}",
            "url": f"https://example.org/{number}.jpg",
            "image": _picture(rng),
            "mask": _MASK,
        }
        for number in range(REFERENCES_COUNT)
    ]
    vectors = unit(rng.normal(size=(REFERENCES_COUNT, 8)))
    specs = [ModelSpec(role, "synthetic", "ba98765432100123", "64 px") for role in ("embedder", "segmenter")]
    table = pa.Table.from_pylist(rows, schema=REFERENCES)
    return write_index(str(folder), table, dict.fromkeys(REGIONS, vectors), "Flat", 1, *specs)


if __name__ == "__main__":
    main()
