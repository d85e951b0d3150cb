"""This module says what localisation is evaluated on: a checkpoint, captions, and where memorisation is known to be.

In a planted world, the planted regions are known exactly. For any other checkpoint, a person can give masks. Prompts
that are not memorised are included, so that false alarms are seen.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from memscan.config import GeneratorConfig
from memscan.errors import InputError, RowReject
from memscan.io import images, storage
from memscan.planted.world import read_truth, world_config, world_folder, world_source
from memscan.prompts.table import normalise
from memscan.records import Label, prompt_id

Cells = NDArray[np.bool_]
COLUMNS = ("caption", "mask")


@dataclass(frozen=True)
class Subject:
    """These are P prompts of one checkpoint, the memorised ones first.

    Attributes:
        name: one line that names it exactly.
        generator: the checkpoint and its sampling rule.
        captions, prompt_ids: of the P prompts.
        memorised: how many of them are; the others are not.
        regions: the memorised cells on a grid (h, w) of each memorised prompt, (memorised, h, w).
        earlier: the UNet folder of a less trained checkpoint; None leaves out the maps that compare with one.
    """

    name: str
    generator: GeneratorConfig
    captions: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    memorised: int
    regions: Callable[[tuple[int, ...]], Cells]
    earlier: Path | None


def planted_subject(world: str | Path | None, most_ordinary: int | None = None) -> Subject:
    """Return the FM and BM prompts of a planted world, and as many NM prompts, or fewer, evenly from its list.

    Raises:
        ModelError: no planted world there.
    """
    rows = read_truth(world).to_pylist()
    partial = [row for row in rows if row["label"] in (Label.FM.value, Label.BM.value)]
    ordinary = [row for row in rows if row["label"] == Label.NM.value]
    count = min(len(ordinary), len(partial) if most_ordinary is None else most_ordinary)
    taken = np.linspace(0, len(ordinary) - 1, count).round().astype(int)
    chosen = [*partial, *(ordinary[place] for place in taken)]
    return Subject(
        name=world_source(world),
        generator=world_config(world).generator,
        captions=tuple(row["caption"] for row in chosen),
        prompt_ids=tuple(row["prompt_id"] for row in chosen),
        memorised=len(partial),
        regions=lambda shape: planted_regions(world, partial, shape),
        earlier=world_folder(world) / "snapshot" / "unet",
    )


def planted_regions(world: str | Path | None, rows: list[dict[str, Any]], shape: tuple[int, ...]) -> Cells:
    """Return the memorised cells of FM and BM prompts, (P, h, w).

    A cell is memorised where the planted region covers at least half of it, on average over the group's training
    images. An FM group has one object in one place. A BM group has one background behind objects that are all
    different, so that no single image says where a generation shows it.
    """
    table = pq.read_table(world_folder(world) / "references.parquet", columns=["reference_id", "mask"])
    masks = dict(zip(table["reference_id"].to_pylist(), table["mask"].to_pylist(), strict=True))
    regions: dict[str, Cells] = {}
    for row in rows:
        if row["group"] not in regions:
            objects = [np.asarray(Image.open(io.BytesIO(masks[name])).convert("L")) for name in row["reference_ids"]]
            object_HW = np.mean(objects, axis=0).astype(np.float32) / 255
            regions[row["group"]] = cells(object_HW if row["label"] == Label.FM.value else 1 - object_HW, shape)
    return np.stack([regions[row["group"]] for row in rows])


def cells(region_HW: NDArray[np.float32], shape: tuple[int, ...]) -> Cells:
    """Return the cells of a grid (h, w) of which a region in [0, 1] covers at least half."""
    return np.asarray(Image.fromarray(region_HW).resize((shape[1], shape[0]), Image.Resampling.BOX)) >= 0.5


def masked_subject(generator: GeneratorConfig, path: str) -> Subject:
    """Read prompts of a person's own from a CSV file with the columns `caption` and `mask`.

    A mask is an image file, white where the caption's generations are memorised, relative to the CSV file's folder;
    a caption without one is not memorised.

    Raises:
        InputError: no such file, not CSV, a column is missing, a mask cannot be read or is black, or none is given.
    """
    try:
        table = list(csv.DictReader(io.StringIO(storage.read_bytes(path).decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is not CSV in UTF-8 ({error})", where=path) from error
    lacking = [name for name in COLUMNS if table and table[0].get(name) is None]
    if not table or lacking:
        what = f"has no column {' and no column '.join(lacking)}" if lacking else "holds no prompts"
        raise InputError(what, where=path, hint=f"columns are {', '.join(COLUMNS)}")
    folder = Path(path).parent
    memorised: list[tuple[str, NDArray[np.float32]]] = []
    ordinary: list[str] = []
    for number, row in enumerate(table, start=1):
        caption = normalise(row["caption"] or "")
        if not caption:
            raise InputError(f"row {number} has no caption", where=path)
        if row["mask"]:
            memorised.append((caption, _mask(folder / row["mask"])))
        else:
            ordinary.append(caption)
    if not memorised:
        raise InputError("no caption has a mask", where=path)
    captions = (*(caption for caption, _ in memorised), *ordinary)
    return Subject(
        name=f"{Path(path).name}, {generator.path}",
        generator=generator,
        captions=captions,
        prompt_ids=tuple(map(prompt_id, captions)),
        memorised=len(memorised),
        regions=lambda shape: np.stack([cells(mask_HW, shape) for _, mask_HW in memorised]),
        earlier=None,
    )


def _mask(path: Path) -> NDArray[np.float32]:
    try:
        mask_HW = images.decode_mask(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    except RowReject as reject:
        raise InputError(f"is not a mask: {reject.message}", where=str(path)) from reject
    if not (mask_HW >= 0.5).any():
        raise InputError(
            "marks nothing",
            where=str(path),
            hint="leave the mask empty if the caption is not memorised; white marks what is memorised",
        )
    return mask_HW
