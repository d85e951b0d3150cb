"""Queries a second and memory of the reference index, against an exact flat index over the same vectors, in one run.

Synthetic near-duplicates: a quarter as many originals as vectors, in some thousand topics, each with four copies at a
cosine of about .93; queries are further copies of originals. Both sides answer the same queries in one batch of 1,000
on all cores, and R@1 is the share of queries whose nearest vector is the flat index's. Our side is what a scan calls:
search of codes, then ranking by half precision vectors, on shards that were written, verified and mapped again.

Each size runs in processes of its own: one makes the vectors and the exact answers, one builds, one searches; peak
memory is theirs. The slope is that of the logarithm of a cost over that of the number of vectors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memscan.index import vectors as faiss_vectors
from memscan.index.choice import choose
from memscan.index.manifest import FORMAT, Manifest
from memscan.index.shards import write_shard, write_template
from memscan.index.store import METRIC, ReferenceIndex
from memscan.records import REFERENCES

DIMENSION = 512
COPIES = 4
QUERIES = 1000
SHARD_ROWS = 524_288


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, nargs="+", default=[100_000, 316_000, 1_000_000])
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--step", choices=("make", "build", "search"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        steps = {"make": _make, "build": _build, "search": _search}
        print(json.dumps(steps[arguments.step](arguments)))
        return
    rows = []
    for count in arguments.count:
        with tempfile.TemporaryDirectory(prefix="memscan-bench-") as folder:
            row: dict[str, Any] = {"count": count}
            for step in ("make", "build", "search"):
                row |= _run(step, folder, count, arguments.factory)
            row["ratio"] = row["queries_s"] / row["flat_queries_s"]
            row["resident_share"] = row["resident_bytes"] / row["index_bytes"]
            rows.append(row)
            print(_line(row), flush=True)
    slopes = {name: _slope(rows, name) for name in ("build_s", "search_us", "index_bytes")} if len(rows) > 1 else {}
    if slopes:
        print("log-log slope  " + "   ".join(f"{name} {slope:.2f}" for name, slope in slopes.items()))
    settings = {"dimension": DIMENSION, "queries": QUERIES, "shard_rows": SHARD_ROWS, "threads": os.cpu_count()}
    print(json.dumps({"benchmark": "index", "settings": settings, "rows": rows, "slopes": slopes}))


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['count']:>9,}  {row['factory']:<28} build {row['build_s']:6.0f} s, peak {row['build_peak'] / 1e9:.2f} GB"
        f"   flat {row['flat_queries_s']:7.0f} q/s   ours {row['queries_s']:7.0f} q/s ({row['ratio']:.0f} x)"
        f"   R@1 {row['recall']:.4f}   resident {row['resident_bytes'] / 1e6:.0f} of {row['index_bytes'] / 1e6:.0f} MB"
        f" ({100 * row['resident_share']:.0f} %)"
    )


def _run(step: str, folder: str, count: int, factory: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.index", "--step", step, "--folder", folder]
    done = subprocess.run(
        [*command, "--count", str(count), "--factory", factory], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _slope(rows: list[dict[str, Any]], name: str) -> float:
    first, last = rows[0], rows[-1]
    return math.log(last[name] / first[name]) / math.log(last["count"] / first["count"])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _originals(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    topics = _unit(rng.standard_normal((2000, DIMENSION), dtype=np.float32))
    own = _unit(rng.standard_normal((count // COPIES, DIMENSION), dtype=np.float32))
    return _unit(0.6 * topics[rng.integers(0, len(topics), len(own))] + 0.8 * own)


def _make(arguments: argparse.Namespace) -> dict[str, Any]:
    """Vectors on disk, queries, and the exact answer with its time."""
    (count,) = arguments.count
    originals, rng = _originals(count), np.random.default_rng(1)
    count = len(originals) * COPIES
    stored = np.lib.format.open_memmap(f"{arguments.folder}/vectors.npy", "w+", np.float32, (count, DIMENSION))
    for copy in range(COPIES):
        noise = _unit(rng.standard_normal(originals.shape, dtype=np.float32))
        stored[copy::COPIES] = _unit(originals + 0.4 * noise)
    chosen = originals[rng.integers(0, len(originals), QUERIES)]
    queries = _unit(chosen + 0.5 * _unit(rng.standard_normal(chosen.shape, dtype=np.float32)))
    stored.flush()
    faiss = faiss_vectors.load_faiss()
    flat = faiss.IndexFlatIP(DIMENSION)
    flat.add(np.load(f"{arguments.folder}/vectors.npy"))
    flat.search(queries[:32], 1)
    start = time.perf_counter()
    _, nearest = flat.search(queries, 1)
    seconds = time.perf_counter() - start
    np.savez(f"{arguments.folder}/queries.npz", queries=queries, nearest=nearest[:, 0])
    return {"flat_queries_s": QUERIES / seconds}


def _build(arguments: argparse.Namespace) -> dict[str, Any]:
    stored = np.load(f"{arguments.folder}/vectors.npy", mmap_mode="r")
    count, folder = len(stored), f"{arguments.folder}/index"
    chosen = choose(count, DIMENSION, regions=1)
    factory = chosen.factory if arguments.factory == "auto" else arguments.factory
    start = time.perf_counter()
    sample = np.ascontiguousarray(stored[faiss_vectors.training_rows(count, factory)])
    template = faiss_vectors.train(sample, factory, count)
    trained = time.perf_counter() - start
    del sample
    entries = write_template(folder, {"whole": template})
    shards = [
        write_shard(
            folder,
            f"{at:05d}",
            _references(first, min(count, first + SHARD_ROWS)),
            {"whole": partial(_part, stored, first)},
            lambda region: template,
            factory,
        )
        for at, first in enumerate(range(0, count, SHARD_ROWS))
    ]
    manifest = Manifest(
        FORMAT, 1, DIMENSION, ("whole",), factory, "", chosen.nprobe, METRIC, "none", "none", entries, tuple(shards)
    )
    manifest.save(folder)
    return {
        "factory": factory,
        "build_s": time.perf_counter() - start,
        "train_s": trained,
        "build_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "index_bytes": manifest.bytes,
        "vector_bytes": count * DIMENSION * 4,
        "nprobe": manifest.nprobe,
        "shards": len(shards),
    }


def _part(stored: np.ndarray, first: int) -> np.ndarray:
    return np.ascontiguousarray(stored[first : first + SHARD_ROWS])


def _references(start: int, stop: int) -> Iterator[pa.Table]:
    for first in range(start, stop, 8192):
        ids = pa.array([f"{row:012d}" for row in range(first, min(stop, first + 8192))])
        nothing = [pa.nulls(len(ids), field.type) for field in REFERENCES if field.name != "reference_id"]
        yield pa.Table.from_arrays([ids, *nothing], schema=REFERENCES)


def _search(arguments: argparse.Namespace) -> dict[str, Any]:
    with np.load(f"{arguments.folder}/queries.npz") as file:
        queries, truth = file["queries"], file["nearest"]
    faiss_vectors.load_faiss().omp_get_max_threads()
    before = _resident("VmRSS")
    # From here on VmHWM is the highest it gets, not what the imports needed.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = time.perf_counter()
    index = ReferenceIndex.open(f"{arguments.folder}/index", None)
    opened = time.perf_counter() - start
    answer, seconds = None, []
    for _ in range(5):
        start = time.perf_counter()
        answer = index.nearest({"whole": queries}, 1)["whole"]
        seconds.append(time.perf_counter() - start)
    single = time.perf_counter()
    for query in range(100):
        index.nearest({"whole": queries[query : query + 1]}, 1)
    single_us = 1e4 * (time.perf_counter() - single)
    assert answer is not None
    peak = _resident("VmHWM")
    return {
        "open_s": opened,
        "queries_s": QUERIES / sorted(seconds)[2],
        "search_us": 1e6 * sorted(seconds)[2] / QUERIES,
        "single_us": single_us,
        "recall": float((answer[0][:, 0] == truth).mean()),
        "resident_bytes": peak - before,
        "process_bytes": peak,
    }


def _resident(field: str) -> int:
    """Bytes of this process that are in memory now (VmRSS), or at most were (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


if __name__ == "__main__":
    main()
