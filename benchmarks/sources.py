"""Reading references from very many files and tars, without models: counts conserve, and what the driver holds.

    python -m benchmarks.sources                                     # 10,000 and 100,000 files, 100 and 1,000 tars
    python -m benchmarks.sources --files 1000000 --list-only         # what a driver does before its workers read

Files are links to a few small JPEG images, tars hold a hundred samples each; one file and one member in a hundred are
no images. "listed" is what a driver does and holds: the layout and the chunks of the work. "read" is all rows read once
in the same process, as workers do, by a reader that keeps none. Each size is a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BAD_EVERY, MEMBERS, FOLDER, PICTURES = 100, 100, 1000, 32


def picture(seed: int) -> bytes:
    """A small JPEG."""
    sink = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((48, 48)).save(sink, "JPEG")
    return sink.getvalue()


def make_files(folder: Path, count: int) -> None:
    """Files below folders of a thousand: images, and in between such as begin like no image."""
    kept: list[Path] = []
    for number in range(count):
        place = folder / f"{number // FOLDER:05d}"
        if number % FOLDER == 0:
            place.mkdir()
        if number % (PICTURES * FOLDER) == 0:  # a file has at most some ten thousand links
            kept = []
        path = place / f"{number:09d}.jpg"
        if len(kept) < PICTURES:
            path.write_bytes(b"no image" if len(kept) == 0 else picture(len(kept)))
            kept.append(path)
        else:
            path.hardlink_to(kept[0] if number % BAD_EVERY == 0 else kept[1 + number % (PICTURES - 1)])


def make_tars(folder: Path, count: int) -> None:
    """Tars as img2dataset writes them: a picture, its caption and its metadata for each sample."""
    pictures = [picture(seed) for seed in range(PICTURES)]
    for tar in range(count):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as out:
            for member in range(MEMBERS):
                key = f"{tar:05d}{member:04d}"
                data = b"no image" if member == 0 else pictures[member % PICTURES]
                texts = f"caption {key}".encode(), json.dumps({"key": key, "url": f"https://x/{key}"}).encode()
                for ending, content in zip(("jpg", "txt", "json"), (data, *texts), strict=True):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))


def measure(folder: str, list_only: bool) -> dict[str, Any]:
    """List a source, and read all of it, in this process."""
    from memscan.config import IndexConfig
    from memscan.inspection import inspect_references
    from memscan.sources.configured import configured_source

    config = IndexConfig(source=folder)
    before, began = peak(), time.process_time()
    chunks = configured_source(config).chunks().num_rows
    found = {"chunks": chunks, "list_cpu_s": time.process_time() - began, "list_mib": peak() - before}
    if list_only:
        return found
    began = time.process_time()
    facts = inspect_references(config)
    assert facts["rows"] == facts["images"] + sum(facts["rejected"].values())
    counts = {name: facts[name] for name in ("rows", "images", "rejected", "not_taken_count")}
    return found | counts | {"read_cpu_s": time.process_time() - began, "read_mib": peak() - before}


def peak() -> float:
    """The largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--tars", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--list-only", action="store_true", help="do not read the images")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.list_only)))
        return
    wanted = [("files", make_files, count) for count in options.files]
    wanted += [("tars", make_tars, count) for count in ([] if options.list_only else options.tars)]
    for kind, make, count in wanted:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            command = [sys.executable, "-m", "benchmarks.sources", "--measure", folder]
            command += ["--list-only"] if options.list_only else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout)
        held = count if kind == "files" else count * MEMBERS
        assert options.list_only or found["rows"] + found["not_taken_count"] == held, (found, held)
        print(f"{count:,} {kind}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
