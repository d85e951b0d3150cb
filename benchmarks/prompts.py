"""Reading prompts: CPU seconds and peak memory beside pandas and pyarrow, which read and group by the caption only.

    python -m benchmarks.prompts                      # 1,000,000 captions as LAION has them, Parquet and CSV
    python -m benchmarks.prompts --scale 100000 1000000 10000000    # and cutting into parts: memory, slope

Each reading is a process of its own. Captions are made of common words, one in twelve with letters beyond ASCII, some
with HTML entities, a separator or quotes; nearly all are distinct. With --scale they lie in Parquet files of a million,
and every tenth stands in each of a file's hundred thousands again; what comes out is written as a scan writes parts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

WORDS = [
    *("the", "a", "of", "red", "blue", "house", "cat", "dog", "mountain", "photo", "portrait", "vintage", "print"),
    *("poster", "wedding", "dress", "car", "2019", "new", "shop", "sale", "art", "canvas", "wall", "black", "white"),
    *("woman", "man", "with", "and", "for", "in", "on"),
]
READERS = ("memscan", "pandas", "pyarrow")
CHUNK, FILE, PART = 100_000, 1_000_000, 10_000
SCALED = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])


def make(folder: Path, rows: int) -> None:
    """Write the captions as Parquet and as CSV."""
    rng = random.Random(0)
    schema = pa.schema(
        [("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int64()), ("similarity", pa.float64())]
    )
    with (
        pq.ParquetWriter(folder / "prompts.parquet", schema) as parquet,
        pyarrow.csv.CSVWriter(
            folder / "prompts.csv", schema, write_options=pyarrow.csv.WriteOptions(quoting_style="needed")
        ) as csv,
    ):
        for start in range(0, rows, 100_000):
            numbers = range(start, min(rows, start + 100_000))
            table = pa.table(
                {
                    "URL": [f"https://cdn.example.com/{rng.getrandbits(60):x}/{number}.jpg" for number in numbers],
                    "TEXT": [caption(rng) for _ in numbers],
                    "WIDTH": [512] * len(numbers),
                    "similarity": [rng.random() for _ in numbers],
                },
                schema=schema,
            )
            parquet.write_table(table)
            csv.write_table(table)


def caption(rng: random.Random) -> str:
    text, kind = " ".join(rng.choices(WORDS, k=rng.randint(3, 14))), rng.random()
    if kind < 0.08:
        text += " café München"
    elif kind < 0.11:
        text += " &amp; more"
    elif kind < 0.25:
        text += f", {text[:20]}"
    elif kind < 0.28:
        text = f'"{text}" print'
    return f"{text} {rng.randint(0, 800_000)}"


def make_many(folder: Path, rows: int) -> int:
    """Write Parquet files of a million captions; how many distinct ones there are."""
    rng = random.Random(1)
    texts = pa.array([caption(rng) for _ in range(CHUNK)])
    numbers = np.arange(CHUNK)
    for file in range(-(-rows // FILE)):
        with pq.ParquetWriter(folder / f"{file:04d}.parquet", SCALED) as out:
            for start in range(file * FILE, min(rows, (file + 1) * FILE), CHUNK):
                chunk = np.where(numbers % 10 == 0, 0, start // CHUNK).astype(str)
                captions = pc.binary_join_element_wise(texts, pa.array(chunk), " no. ")
                urls = pc.binary_join_element_wise(
                    "https://cdn.example.com", pa.array((start + numbers).astype(str)), "/"
                )
                out.write_table(pa.table([urls, captions], schema=SCALED).slice(0, rows - start))
    others = len({text for at, text in enumerate(texts.to_pylist()) if at % 10})
    # Of the first hundred thousand all, of the others those that do not stand there.
    return len(set(texts.to_pylist())) + (-(-rows // CHUNK) - 1) * others


def cut(folder: str, rows: int) -> dict[str, Any]:
    """Read a folder and write its prompts in parts, in this process; check that every row is in one of them."""
    from memscan.config import PromptsConfig
    from memscan.prompts.table import read_prompts
    from pipelines.run_folder.tables import total_inputs, write_table

    before, began = private_mib(), time.time()
    with tempfile.TemporaryDirectory(dir=folder) as scratch, Peak() as peak:
        found = read_prompts(PromptsConfig(paths=[f"{folder}/*.parquet"]), scratch)
        read_at, spilled = time.time(), disk_mib(Path(scratch))
        inputs = prompts = 0
        for number, table in enumerate(found.parts(PART)):
            write_table(f"{scratch}/parts/part-{number:05d}.parquet", table)
            inputs, prompts = inputs + total_inputs(table), prompts + table.num_rows
        parts = disk_mib(Path(scratch) / "parts")
    assert inputs == found.rows_read == rows
    assert prompts == found.num_rows
    return {
        "rows": rows,
        "distinct": found.distinct,
        "read_s": read_at - began,
        "cut_s": time.time() - read_at,
        "cpu_s": time.process_time(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "private_mib": peak.mib,
        "before_mib": before,
        "spilled_mib": spilled,
        "parts_mib": parts,
    }


class Peak:
    """The largest private memory of this process, looked at ten times a second: mapped files are not in it."""

    def __init__(self) -> None:
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(0.1):
            self.mib = max(self.mib, private_mib())


def private_mib() -> float:
    """Private memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def disk_mib(folder: Path) -> float:
    """What the files of a folder take."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def scale(sizes: list[int]) -> None:
    """Read and cut so many prompts, each number in a process of its own."""
    cpu: dict[int, float] = {}
    print(
        f"{'rows':>12}{'distinct':>12}{'read s':>9}{'cut s':>8}{'CPU s':>8}{'peak MiB':>10}{'private':>9}{'on disk':>9}"
    )
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            distinct = make_many(Path(folder), rows)
            command = [sys.executable, "-m", "benchmarks.prompts", "--cut", folder, str(rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            one = json.loads(done.stdout)
        assert one["distinct"] == distinct, (one, distinct)
        cpu[rows] = one["cpu_s"]
        shown = (
            f"{rows:12,}{distinct:12,}{one['read_s']:9.1f}{one['cut_s']:8.1f}{one['cpu_s']:8.1f}{one['peak_mib']:10.0f}"
        )
        print(f"{shown}{one['private_mib']:9.0f}{one['spilled_mib']:9.0f}  {json.dumps(one)}", flush=True)
    if len(sizes) > 1:
        slope = np.polyfit(np.log(list(cpu)), np.log(list(cpu.values())), 1)[0]
        print(f"log-log slope of CPU seconds against rows: {slope:.3f}")


def read(reader: str, file: str) -> dict[str, Any]:
    """Read a file and fold its captions, in this process."""
    import pandas as pd

    from memscan.config import PromptsConfig
    from memscan.prompts.table import read_prompts

    parquet = file.endswith(".parquet")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if reader == "memscan":
        distinct = read_prompts(PromptsConfig(paths=[file])).distinct
    elif reader == "pandas":
        frame = (
            pd.read_parquet(file, columns=["TEXT", "URL"]) if parquet else pd.read_csv(file, usecols=["TEXT", "URL"])
        )
        distinct = len(frame.groupby("TEXT", sort=False)["URL"].agg(["first", "size"]))
    else:
        table = pq.read_table(file, columns=["TEXT", "URL"]) if parquet else pyarrow.csv.read_csv(file)
        distinct = table.group_by("TEXT").aggregate([("URL", "min"), ("URL", "count")]).num_rows
    cpu = time.process_time() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"reader": reader, "file": Path(file).suffix[1:], "cpu_s": cpu, "peak_mib": peak, "distinct": distinct}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--scale", type=int, nargs="+", metavar="ROWS", help="read and cut so many; multiples of 100,000"
    )
    parser.add_argument("--cut", nargs=2, metavar=("FOLDER", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cut:
        print(json.dumps(cut(options.cut[0], int(options.cut[1]))))
        return
    if options.scale:
        scale(options.scale)
        return
    if options.read:
        print(json.dumps(read(*options.read)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), options.rows)
        for kind in ("parquet", "csv"):
            for reader in READERS:
                command = [sys.executable, "-m", "benchmarks.prompts", "--read", reader, f"{scratch}/prompts.{kind}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout)
                cost = f"{found['cpu_s']:6.2f} s CPU  {found['peak_mib']:6.0f} MiB"
                print(f"{kind:<8} {reader:<8} {cost}  {found['distinct']:,} distinct")


if __name__ == "__main__":
    main()
