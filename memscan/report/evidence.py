"""This module reads what the report shows of flagged prompts from large Parquet files.

Census and reference files are mostly pixels. Ids are read first, by themselves; other columns only of the row groups
that hold a wanted row, and of those a few rows at a time, so memory does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.census.verdict import verdict
from memscan.config import MetricConfig, VerdictConfig
from memscan.io import storage
from memscan.records import Label

_BATCH_ROWS = 64  # pixels of so many rows are in memory at a time
_GENERATION = "generations.list.element."


@dataclass(frozen=True)
class Match:
    """This is a training image as the index stores it.

    `image` and `mask` are encoded; they are None if they were not asked for.
    """

    reference_id: str
    caption: str | None
    url: str | None
    image: bytes | None = None
    mask: bytes | None = None


@dataclass(frozen=True)
class Pair:
    """This is a memorised generation (as in `Exhibit`), its encoded image and the training image that it matches."""

    generation: Mapping[str, Any]
    image: bytes | None
    match: Match | None


@dataclass(frozen=True)
class Exhibit:
    """This is a flagged prompt (a row of `records.FLAGGED`) with its best evidence.

    `generation` holds that generation's `sample`, `seed`, `similarity`, `foreground_area`, scores and `match_id`;
    `labels` the labels of all generations by sample number. Pixels are encoded images, None if they are missing;
    `localization` is where the model's signals see memorisation (8-bit greyscale).
    """

    row: Mapping[str, Any]
    generation: Mapping[str, Any]
    labels: tuple[str, ...]
    image: bytes | None
    mask: bytes | None
    match: Match | None
    localization: bytes | None = None
    pairs: tuple[Pair, ...] = ()  # every memorised generation, the best evidence first


def find_matches(paths: Sequence[str], ids: Collection[str], *, pixels: bool = False) -> dict[str, Match]:
    """Look reference images up by id in Parquet files of `records.REFERENCES`; ids that they lack are left out."""
    return {match.reference_id: match for match in iter_matches(paths, ids, pixels=pixels)}


def iter_matches(paths: Sequence[str], ids: Collection[str], *, pixels: bool = False) -> Iterator[Match]:
    """Yield what `find_matches` returns, each id once, so that not all images are in memory at the same time."""
    columns = ["caption", "url", *(["image", "mask"] if pixels else [])]
    left = set(ids)
    for path in paths:
        if not left:
            break
        for row in pick_rows(path, "reference_id", left.copy(), columns):
            if row["reference_id"] in left:
                left.discard(row["reference_id"])
                yield Match(**row)


def gather_exhibits(
    rows: Sequence[Mapping[str, Any]],
    folder: str,
    references: Sequence[str],
    rule: VerdictConfig,
    metric: MetricConfig,
    *,
    pixels: bool = True,
) -> list[Exhibit]:
    """Fetch the evidence of flagged prompts, in the order given.

    Args:
        rows: rows of `records.FLAGGED`.
        folder: the run folder, which their `evidence_file` is in. If a file has gone, so has its evidence.
        references: the Parquet files of `records.REFERENCES`; none if they are not available.
        rule, metric: as the flagged list was made with, so that the same generation is found to be the best evidence.
        pixels: False leaves all images out.
    """
    wanted: dict[str, set[str]] = {}
    for row in rows:
        if row["evidence_file"] is not None:
            wanted.setdefault(storage.join(folder, row["evidence_file"]), set()).add(str(row["prompt_id"]))
    found: dict[str, list[dict[str, Any]]] = {}
    for file, prompts in sorted(wanted.items()):
        if storage.exists(file):
            for row in pick_rows(file, "prompt_id", prompts, _generation_leaves(file, pixels)):
                found[row["prompt_id"]] = _best_first(row["generations"], rule, metric)
    matches = {one["match_id"] for generations in found.values() for one in _memorised(generations)}
    known = find_matches(references, matches, pixels=pixels)
    return [_exhibit(row, found.get(row["prompt_id"], []), known) for row in rows]


def pick_rows(path: str, key: str, wanted: Collection[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Return the rows of a Parquet file whose `key` is in `wanted`.

    They have the columns `key` and `columns` (nested leaves are named by their dotted path).
    """
    if not wanted:
        return
    values = pa.array(sorted(wanted), pa.string())
    filesystem, inner = storage.arrow_filesystem(path)
    with filesystem.open_input_file(inner) as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        groups = _groups_with(file, key, values)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[key, *columns]) if groups else ():
            yield from batch.filter(pc.is_in(batch[key], value_set=values)).to_pylist()


def _groups_with(file: pq.ParquetFile, key: str, values: pa.Array) -> list[int]:
    hits = pc.is_in(file.read(columns=[key])[key], value_set=values).to_numpy()
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    found: list[int] = np.unique(np.searchsorted(ends, np.flatnonzero(hits), side="right")).tolist()
    return found


def leaves(path: str, prefix: str, without: Sequence[str] = ()) -> list[str]:
    """Return the dotted paths of a Parquet file's leaf columns below `prefix`, except those below one of `without`."""
    filesystem, inner = storage.arrow_filesystem(path)
    with filesystem.open_input_file(inner) as source:
        return leaves_of(pq.ParquetFile(source, page_checksum_verification=True), prefix, without)


def leaves_of(file: pq.ParquetFile, prefix: str, without: Sequence[str] = ()) -> list[str]:
    """Return what `leaves` returns, for a file that is open."""
    paths = [file.schema.column(position).path for position in range(len(file.schema))]
    return [leaf for leaf in paths if leaf.startswith(prefix) and not leaf.startswith(tuple(without))]


def _generation_leaves(file: str, pixels: bool) -> list[str]:
    left_out = [f"{_GENERATION}candidates"]
    left_out += [] if pixels else [f"{_GENERATION}evidence", f"{_GENERATION}localization"]
    return leaves(file, _GENERATION, left_out)


def _best_first(
    generations: Sequence[dict[str, Any]], rule: VerdictConfig, metric: MetricConfig
) -> list[dict[str, Any]]:
    """Return all generations by sample number but the best evidence in front; of the others no mask and no map."""
    best = verdict(generations, rule, metric).best
    first = generations[best or 0]
    rest = [
        {**one, "localization": None, "evidence": {"generation": (one.get("evidence") or {}).get("generation")}}
        for one in generations
        if one is not first
    ]
    return [first, *sorted(rest, key=lambda one: int(one["sample"]))]


def _memorised(generations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the best evidence, and every other generation that is memorised."""
    return [*generations[:1], *(one for one in generations[1:] if one["label"] != Label.NM.value)]


def _exhibit(row: Mapping[str, Any], generations: Sequence[Mapping[str, Any]], known: Mapping[str, Match]) -> Exhibit:
    if not generations:
        return Exhibit(row, {}, (), None, None, None)
    best = generations[0]
    evidence = best.get("evidence") or {}
    by_sample = sorted(generations, key=lambda one: int(one["sample"]))
    return Exhibit(
        row=row,
        generation=best,
        labels=tuple(str(one["label"]) for one in by_sample),
        image=evidence.get("generation"),
        mask=evidence.get("generation_mask"),
        match=known.get(best["match_id"]),
        localization=best.get("localization"),
        pairs=tuple(
            Pair(one, (one.get("evidence") or {}).get("generation"), known.get(one["match_id"]))
            for one in _memorised(generations)
        ),
    )
