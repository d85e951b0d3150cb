"""This module writes the evidence of a run as image files.

They are pairs of generation and training image, with a manifest of their hashes.

    OUT/metadata.csv           one row per image, in the layout of Hugging Face's `imagefolder`: `datasets.load_dataset(
                               "imagefolder", data_dir=OUT)` reads it
    OUT/manifest.json          sha256 of every file, the run, its models and thresholds
    OUT/README.md              what this is, for somebody who was handed the folder
    OUT/generations/ID-SAMPLE.png   OUT/references/NAME.png

No folder has the name of a split: what lies in `training/` would be the split "train" by itself, without metadata.
Pixels are the stored ones, written without loss. Names come from hashes, so that ids out of data never become paths.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memscan.errors import MemscanError, RowReject
from memscan.io import images, storage
from memscan.report.evidence import Exhibit, Match

FORMAT = "memscan-export/1"
COLUMNS = (
    "file_name",
    "kind",
    "prompt_id",
    "caption",
    "verdict",
    "label",
    "sample",
    "seed",
    "foreground",
    "background",
    "reference_id",
    "training_file",
    "review",
)


def export_pairs(
    folder: Path, exhibits: Iterator[Exhibit], about: Mapping[str, Any], reviewed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write the pairs of flagged prompts into a new folder.

    Args:
        exhibits: flagged prompts with the evidence of all their generations.
        about: what the manifest says of the run: JSON values.
        reviewed: prompt id -> a person's verdict.

    Returns:
        The manifest. Its counts: prompts, generations and training images written; `without` names what could not be:
        prompt id or reference id -> why.

    Raises:
        MemscanError: the folder is there already and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise MemscanError("is not empty, and nothing is overwritten", where=str(folder), hint="choose another --out")
    written: dict[str, str] = {}
    without: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    prompts = 0
    for exhibit in exhibits:
        found = [*_rows(folder, exhibit, written, without, reviewed or {})]
        rows += found
        prompts += bool(found)
        if not found:
            without.setdefault(str(exhibit.row["prompt_id"]), "no picture of a generation is stored")
    training = sorted(name for name in written if name.startswith("references/"))
    known = {row["training_file"]: row for row in rows}
    rows += [
        {
            **dict.fromkeys(COLUMNS, ""),
            "file_name": name,
            "kind": "training",
            "reference_id": known[name]["reference_id"],
        }
        for name in training
    ]
    storage.write_atomic(folder / "metadata.csv", _csv(rows))
    storage.write_atomic(folder / "README.md", _readme(about).encode())
    for name in ("metadata.csv", "README.md"):
        written[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest = {
        "format": FORMAT,
        **about,
        "prompts": prompts,
        "generations": len(rows) - len(training),
        "training_images": len(training),
        "without": without,
        "sha256": dict(sorted(written.items())),
    }
    storage.write_json(str(folder / "manifest.json"), manifest)
    return manifest


def _rows(
    folder: Path, exhibit: Exhibit, written: dict[str, str], without: dict[str, str], reviewed: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    prompt = str(exhibit.row["prompt_id"])
    for shown in exhibit.pairs:
        if shown.image is None:
            continue
        sample = int(shown.generation["sample"])
        name = f"generations/{_name(prompt)}-{sample}.png"
        if not _write(folder, name, shown.image, written):
            without[f"{prompt} sample {sample}"] = "its picture cannot be decoded"
            continue
        yield {
            "file_name": name,
            "kind": "generation",
            "prompt_id": prompt,
            "caption": exhibit.row["caption"],
            "verdict": exhibit.row["label"],
            **{key: shown.generation[key] for key in ("label", "sample", "seed", "foreground", "background")},
            "reference_id": shown.generation["match_id"],
            "training_file": _training(folder, shown.generation["match_id"], shown.match, written, without),
            "review": reviewed.get(prompt, ""),
        }


def _training(
    folder: Path, reference: str, match: Match | None, written: dict[str, str], without: dict[str, str]
) -> str:
    name = f"references/{_name(reference)}.png"
    if name in written:
        return name
    if match is None or match.image is None:
        without[reference] = "the training image is not in the index"
        return ""
    if not _write(folder, name, match.image, written):
        without[reference] = "the training image cannot be decoded"
        return ""
    return name


def _write(folder: Path, name: str, data: bytes, written: dict[str, str]) -> bool:
    try:
        png = images.encode_png(images.decode(data))
    except RowReject:
        return False
    storage.make_dirs((folder / name).parent)
    storage.write_atomic(folder / name, png)
    written[name] = hashlib.sha256(png).hexdigest()
    return True


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # What a spreadsheet would take for a formula gets an apostrophe, as in the flagged list.
        safe = {key: f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for key, v in row.items()}
        writer.writerow(safe)
    return sink.getvalue().encode("utf-8")


def _readme(about: Mapping[str, Any]) -> str:
    run = about["run"]
    return (
        f"# Evidence of the census {run['name']}\n\n"
        f"Run {run['fingerprint']}, {run['ended']}. These are images that a text-to-image model made, and the\n"
        "training images to which they are similar under the metric and thresholds of manifest.json.\n"
        "This is a technical finding for a person to judge, and not a legal one.\n\n"
        "metadata.csv has one row per image. The training_file of a generation is the image to which it is similar.\n"
        "manifest.json has the sha256 of every file. `datasets.load_dataset('imagefolder', data_dir=FOLDER)`\n"
        "reads the folder.\n"
    )
