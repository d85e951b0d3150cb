"""This module finds pictures of the prompts that differ between two runs: those kept, and those generated again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from memscan.config import VerdictConfig
from memscan.io import images
from memscan.report.diff import Sides, pictured
from memscan.report.evidence import Exhibit, Match, gather_exhibits, pick_rows
from pipelines.run_folder.results import reference_files
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table

WHEN = ("before", "after")


def gather_sides(
    runs: Sequence[Run],
    censuses: Sequence[Mapping[str, Any]],
    lists: Sequence[pa.Table],
    changes: pa.Table,
    same: Callable[[str], str],
    *,
    draw: bool = False,
) -> dict[str, Sides]:
    """The pictures of the page of changes, by prompt id.

    Args:
        runs, censuses, lists: run, census.json and flagged list of both sides.
        changes: `records.CHANGES`.
        same: what makes the ids of both runs those of `changes` (`records.alike`).
        draw: whether a generation that a scan did not keep, since it is not memorised, is drawn by that run's model.

    Raises:
        ModelError: `draw`, and a run's model is not where its configuration says.
    """
    rows = pictured(changes)
    wanted = {row["prompt_id"] for row in rows}
    exhibits = [
        _exhibits(run, census, [row for row in table.to_pylist() if same(row["prompt_id"]) in wanted], same)
        for run, census, table in zip(runs, censuses, lists, strict=True)
    ]
    found = {str(row["prompt_id"]): _sides(*(one.get(row["prompt_id"]) for one in exhibits)) for row in rows}
    if draw:
        captions = {str(row["prompt_id"]): str(row["caption"]) for row in rows}
        for at, run in enumerate(runs):
            samples = {
                key: _sample(exhibits[1 - at].get(key)) for key in found if getattr(found[key], WHEN[at]) is None
            }
            for key, png in _drawn(run, samples, captions, same).items():
                one = found[key]
                drawn = one.drawn | {WHEN[at]}
                found[key] = replace(one, after=png, drawn=drawn) if at else replace(one, before=png, drawn=drawn)
    return found


def _exhibits(
    run: Run, census: Mapping[str, Any], rows: list[dict[str, Any]], same: Callable[[str], str]
) -> dict[str, Exhibit]:
    rule = VerdictConfig.model_validate(census["method"]["verdict"])
    made = gather_exhibits(rows, run.folder.path, reference_files(run), rule, run.config().metric)
    return {same(row["prompt_id"]): exhibit for row, exhibit in zip(rows, made, strict=True)}


def _sides(before: Exhibit | None, after: Exhibit | None) -> Sides:
    matches: dict[str, Match] = {}
    for exhibit in (after, before):
        if exhibit is not None and exhibit.match is not None:
            matches.setdefault(exhibit.match.reference_id, exhibit.match)
    return Sides(before.image if before else None, after.image if after else None, tuple(matches.values()))


def _sample(exhibit: Exhibit | None) -> int:
    """The other side's sample that is shown, so that both pictures have one seed; otherwise the first."""
    return int(exhibit.generation["sample"]) if exhibit is not None and exhibit.generation else 0


def _drawn(
    run: Run, samples: Mapping[str, int], captions: Mapping[str, str], same: Callable[[str], str]
) -> dict[str, bytes]:
    """Generations of these prompts and samples by the run's model, from the seeds that its census names, as PNG."""
    import torch

    from memscan.worker.generation import load_generator

    seeds: dict[str, int] = {}
    leaves = [f"generations.list.element.{name}" for name in ("sample", "seed")]
    for number in run.parts if samples else ():
        for file in run.files(number):
            own = read_table(file, ["prompt_id"])["prompt_id"].to_pylist()
            wanted = [prompt for prompt in own if same(prompt) in samples]
            for row in pick_rows(file, "prompt_id", wanted, leaves) if wanted else ():
                name = same(row["prompt_id"])
                by_sample = {int(one["sample"]): int(one["seed"]) for one in row["generations"]}
                if by_sample:
                    seeds[name] = by_sample.get(samples[name], next(iter(by_sample.values())))
    if not seeds:
        return {}
    device = "cuda" if torch.cuda.is_available() and run.config().resources.device != "cpu" else "cpu"
    made = load_generator(run.config().generator, device).generate([captions[key] for key in seeds], [*seeds.values()])
    shown = zip(seeds, made.images_BHWC, made.finite_B, strict=True)
    return {key: images.encode_png(image_HWC) for key, image_HWC, finite in shown if finite}
