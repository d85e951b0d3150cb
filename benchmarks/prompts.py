"""Reading prompts: CPU seconds and peak memory beside pandas and pyarrow, which read and group by the caption only.

    python -m benchmarks.prompts                      # 1,000,000 captions as LAION has them, Parquet and CSV
    python -m benchmarks.prompts --rows 10000000

Each reading is a process of its own. Captions are made of common words, one in twelve with letters beyond ASCII, some
with HTML entities, a separator or quotes; nearly all are distinct.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

WORDS = [
    *("the", "a", "of", "red", "blue", "house", "cat", "dog", "mountain", "photo", "portrait", "vintage", "print"),
    *("poster", "wedding", "dress", "car", "2019", "new", "shop", "sale", "art", "canvas", "wall", "black", "white"),
    *("woman", "man", "with", "and", "for", "in", "on"),
]
READERS = ("memscan", "pandas", "pyarrow")


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
    options = parser.parse_args()
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
