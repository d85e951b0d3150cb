"""This module compares the pairs of a file as `memscan compare` does.

A team can thus check the metric on its own pictures.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memscan.errors import InputError, Reason, RowReject
from memscan.io import storage
from memscan.metric.calibration import Calibration
from memscan.metric.comparison import Picture, Preparations, compare_pictures, read_image, read_mask
from memscan.metric.fbmem import FbMem
from memscan.metric.labelled import Judged, figures
from memscan.models.embedder import Embedder
from memscan.models.segmenter import Segmenter
from memscan.records import LABELS, Label
from memscan.worker.isolation import Isolation

COLUMNS = ("generated", "reference")
OPTIONAL = ("generated_mask", "reference_mask", "label")
_BATCH = 16


@dataclass(frozen=True)
class PairRow:
    """This is a row of the file: paths as they are written there, and None for empty masks and labels."""

    number: int
    generated: str
    reference: str
    generated_mask: str | None
    reference_mask: str | None
    truth: Label | None


def read_pairs(path: str) -> list[PairRow | tuple[int, dict[str, str], RowReject]]:
    """Return the rows of a CSV file, in its order; a row that cannot be used is a reject with its number and its cells.

    Raises:
        InputError: no such file, not UTF-8, a column is missing, or there are no rows.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 ({error.reason})", where=path) from error
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"is not CSV ({error})", where=path) from error
    names = [name.strip() for name in table[0]] if table else []
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(
            f"has no column {' and no column '.join(missing)}",
            where=path,
            hint=f"columns are {', '.join(COLUMNS)}, and where known {', '.join(OPTIONAL)}",
        )
    repeated = sorted({name for name in names if name in (*COLUMNS, *OPTIONAL) and names.count(name) > 1})
    if repeated:
        raise InputError(f"has the column {repeated[0]} twice", where=path)
    rows = [_parsed(number, names, cells) for number, cells in enumerate(table[1:], start=1) if any(cells)]
    if not rows:
        raise InputError("holds no pairs", where=path)
    return rows


def _parsed(number: int, names: Sequence[str], cells: Sequence[str]) -> PairRow | tuple[int, dict[str, str], RowReject]:
    row = {name: cell.strip() for name, cell in zip(names, cells, strict=False)}
    shown = {name: row.get(name, "") for name in COLUMNS}
    if len(cells) != len(names):
        return number, shown, RowReject(Reason.ROW_MALFORMED, f"{len(cells)} cells for {len(names)} columns")
    empty = [name for name in COLUMNS if not row[name]]
    if empty:
        return number, shown, RowReject(Reason.ROW_MALFORMED, f"{empty[0]} is empty")
    label = row.get("label") or None
    if label is not None and label not in LABELS:
        what = f"label {label!r} is none of {', '.join(LABELS)}"
        return number, shown, RowReject(Reason.ROW_MALFORMED, what)
    masks = (row.get("generated_mask") or None, row.get("reference_mask") or None)
    return PairRow(number, row["generated"], row["reference"], *masks, None if label is None else Label(label))


def compare_pairs(
    path: str,
    metric: FbMem[Any],
    segmenter: Segmenter | None,
    calibration: Calibration | None = None,
    embedder: Embedder | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one object per row, in the file's order.

    If labels are given, the last object has their figures.

    Objects have the row's number and `status`: "done" with what `Comparison.to_json` has, and the row's label as
    `truth`; or "rejected" with `reason` and `message`. Paths are relative to the file's folder.

    Args:
        segmenter: makes the masks that the file does not give; without one, rows that need one are rejected.
        calibration: where the metric's thresholds come from, for probabilities.
        embedder: gives the similarities by region that `combined` takes; None leaves them out.

    Raises:
        InputError: see `read_pairs`.
    """
    folder = Path(path).parent
    isolation, prepare = Isolation(), Preparations(metric)
    judged: list[Judged] = []
    counts = {"done": 0, "rejected": 0}
    labelled = 0
    rows = read_pairs(path)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        heads = [_head(row) for row in batch]
        found = [row if isinstance(row, PairRow) else row[2] for row in batch]
        read = isolation.each(found, partial(_read, folder), Reason.IMAGE_UNDECODABLE)
        masked = isolation.batch(read, partial(_masked, metric, segmenter), Reason.SEGMENTATION_FAILED)
        verdicts = isolation.each(
            masked,
            lambda pair: compare_pictures(metric, *pair, calibration, embedder, maps=False, prepare=prepare),
            Reason.CLASSIFICATION_FAILED,
        )
        for row, head, verdict in zip(batch, heads, verdicts, strict=True):
            truth = row.truth if isinstance(row, PairRow) else None
            labelled += truth is not None
            if isinstance(verdict, RowReject):
                counts["rejected"] += 1
                yield {**head, "status": "rejected", "reason": verdict.reason.value, "message": verdict.message}
                continue
            counts["done"] += 1
            if truth is not None:
                scores = verdict.scores
                judged.append(Judged(head["generated"], truth, verdict.label, scores.foreground, scores.background))
            own = {} if truth is None else {"truth": truth.value}
            yield {**head, "status": "done", **verdict.to_json(), **head, **own}
    if labelled:
        yield {"rows": len(rows), **counts, "labelled": labelled, **(figures(judged) if judged else {})}


def _head(row: PairRow | tuple[int, dict[str, str], RowReject]) -> dict[str, Any]:
    if isinstance(row, PairRow):
        return {"row": row.number, "generated": row.generated, "reference": row.reference}
    return {"row": row[0], **row[1]}


Read = tuple[PairRow, Any, Any, Any, Any]


def _read(folder: Path, row: PairRow) -> Read:
    """Return both images and the masks that the row names."""
    images = [_image(folder / name) for name in (row.generated, row.reference)]
    masks = [
        None if name is None else _mask(folder / name, image)
        for name, image in zip((row.generated_mask, row.reference_mask), images, strict=True)
    ]
    return row, *images, *masks


def _image(path: Path) -> Any:
    if not path.is_file():
        raise RowReject(Reason.IMAGE_MISSING, f"{path}: no such file")
    try:
        return read_image(path)
    except InputError as error:
        raise RowReject(Reason.IMAGE_UNDECODABLE, str(error)) from error


def _mask(path: Path, image_HWC: Any) -> Any:
    if not path.is_file():
        raise RowReject(Reason.IMAGE_MISSING, f"{path}: no such file")
    try:
        return read_mask(path, image_HWC)
    except InputError as error:
        raise RowReject(Reason.SEGMENTATION_FAILED, str(error)) from error


def _masked(
    metric: FbMem[Any], segmenter: Segmenter | None, rows: list[Read]
) -> list[tuple[Picture, Picture] | RowReject]:
    """Pictures with their masks: those of the file, otherwise the segmenter's, made for the batch at once."""
    spared = metric.config.masks == "reference"  # a generation needs no mask of its own
    wanted = [
        (place, side)
        for place, row in enumerate(rows)
        for side in (0, 1)
        if row[3 + side] is None and not (spared and side == 0)
    ]
    made: dict[tuple[int, int], Any] = {}
    if wanted and segmenter is not None:
        masks = segmenter.segment([rows[place][1:3][side] for place, side in wanted])
        made = dict(zip(wanted, masks, strict=True))
    out: list[tuple[Picture, Picture] | RowReject] = []
    for place, row in enumerate(rows):
        lacking = [side for at, side in wanted if at == place and (at, side) not in made]
        if lacking:
            name = COLUMNS[lacking[0]]
            message = f"no {name}_mask and no segmenter (--config or --world)"
            out.append(RowReject(Reason.SEGMENTATION_FAILED, message))
            continue
        names = row[0].generated, row[0].reference
        own = [made.get((place, side), row[3 + side]) for side in (0, 1)]
        first, second = (Picture(*entry) for entry in zip(names, row[1:3], own, strict=True))
        out.append((first, second))
    return out
