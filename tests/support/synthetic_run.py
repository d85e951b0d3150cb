"""A run folder made without models: rows as the scan writes them, through the run folder code that the scan uses."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from memscan.config import CensusConfig
from memscan.errors import Reason
from memscan.index import Manifest, write_index
from memscan.io import images
from memscan.models.specification import ModelSpec
from memscan.prompts.table import PromptTable
from memscan.records import CENSUS, PROMPTS, REFERENCES, REGIONS, prompt_id, sample_seed
from pipelines.run_folder.runs import Run

SCORES = {"VM": (0.95, 0.93), "FM": (0.91, 0.42), "BM": (0.35, 0.88), "NM": (0.41, 0.37)}


@dataclass(frozen=True)
class Planted:
    """A prompt with the labels of its generations ("VM NM", "" if rejected) and the references that they match."""

    caption: str
    labels: str = "NM NM NM NM"
    matches: Sequence[str] = ("ref-0",)
    count: int = 1
    reason: Reason | None = None
    scores: Sequence[tuple[float, float]] = field(default_factory=tuple)
    noise_norm: float | None = 7.5
    mapped: bool = False  # whether memorised generations have a localisation map, bright in its left half

    @property
    def id(self) -> str:
        return prompt_id(self.caption)


def scene(seed: int, shift: int = 0, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a disc on a gradient, and the disc's mask."""
    rng = np.random.default_rng(seed)
    sky, ground, ink = (rng.integers(30, 226, 3) for _ in range(3))
    ramp = np.linspace(0, 1, side)[:, None, None]
    picture = Image.fromarray(np.broadcast_to(sky * (1 - ramp) + ground * ramp, (side, side, 3)).astype(np.uint8))
    x, y, r = (
        rng.integers(side // 4, side * 3 // 4),
        rng.integers(side // 4, side * 3 // 4),
        rng.integers(side // 8, side // 4),
    )
    mask = Image.new("L", (side, side))
    for canvas, colour in ((picture, tuple(int(c) for c in ink)), (mask, 255)):
        ImageDraw.Draw(canvas).ellipse((x - r + shift, y - r, x + r + shift, y + r), fill=colour)
    return np.asarray(picture), np.asarray(mask, dtype=np.float32) / 255


def generation(prompt: Planted, sample: int, label: str, evidence: bool) -> dict[str, Any]:
    foreground, background = prompt.scores[sample] if prompt.scores else SCORES[label]
    match = prompt.matches[sample % len(prompt.matches)]
    row: dict[str, Any] = {
        "sample": sample,
        "seed": sample_seed(prompt.id, sample),
        "label": label,
        "foreground": foreground,
        "background": background,
        "whole": (foreground + background) / 2,
        "match_id": match,
        "foreground_area": 0.2,
        "similarity": 0.8,
        "noise_norm": prompt.noise_norm,
        "noise_norm_first": prompt.noise_norm,
        "candidates": [],
        "evidence": None,
    }
    if evidence and label != "NM":
        image_HWC, mask_HW = scene(int(match.removeprefix("ref-") or 0), shift=1)
        row["evidence"] = {"generation": images.encode_png(image_HWC), "generation_mask": images.encode_mask(mask_HW)}
        if prompt.mapped:
            map_HW = np.broadcast_to(np.linspace(1, 0, 8) > 0.5, (8, 8)).astype(np.float32)
            row |= {"localization": images.encode_mask(map_HW), "localized_foreground": 0.75}
    return row


def census_row(prompt: Planted, number: int = 1, evidence: bool = True) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "caption": prompt.caption,
        "count": prompt.count,
        "source": "prompts.csv",
        "row": number,
        "url": None,
        "status": "rejected" if prompt.reason else "done",
        "reason": prompt.reason.value if prompt.reason else None,
        "message": "made for a test" if prompt.reason else None,
        "generations": [
            generation(prompt, sample, label, evidence)
            for sample, label in enumerate(() if prompt.reason else prompt.labels.split())
        ],
    }


def census_table(prompts: Sequence[Planted], evidence: bool = True) -> pa.Table:
    rows = [census_row(prompt, number + 1, evidence) for number, prompt in enumerate(prompts)]
    return pa.Table.from_pylist(rows, schema=CENSUS)


def write_references(folder: Path, count: int) -> Manifest:
    """A real index, by id; its vectors say nothing."""

    def encoded(array: np.ndarray) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(array).save(sink, "PNG")
        return sink.getvalue()

    rows = []
    for number in range(count):
        image_HWC, mask_HW = scene(number)
        rows.append(
            {
                "reference_id": f"ref-{number}",
                "caption": f"a disc, number {number}",
                "url": f"https://example.org/images/{number}.jpg" if number % 3 else None,
                "image": encoded(image_HWC),
                "mask": images.encode_mask(mask_HW),
            }
        )
    vectors_ND = np.eye(count, dtype=np.float32)
    specs = [ModelSpec(role, "tiny", "ba98765432100123", "64 px") for role in ("embedder", "segmenter")]
    table = pa.Table.from_pylist(rows, schema=REFERENCES)
    return write_index(str(folder), table, dict.fromkeys(REGIONS, vectors_ND), "Flat", 1, *specs)


def configuration(out: Path, **sections: Any) -> CensusConfig:
    return CensusConfig.model_validate(
        {
            "name": "synthetic",
            "out": str(out),
            "prompts": {"paths": ["prompts.csv"]},
            "generator": {"path": "models/checkpoint"},
            "segmenter": {"path": "models/segmenter.onnx"},
            "embedder": {"path": "models/embedder.pt", "sha256": "0" * 64},
            "index": {"source": "references.parquet"},
            "metric": {"canvas": 176, "threshold_source": "calibrated on a test"},
            **sections,
        }
    )


def write_run(
    out: Path,
    prompts: Sequence[Planted],
    *,
    references: int = 8,
    part_size: int = 4,
    finished: bool = True,
    committed: int | None = None,
    evidence: bool = True,
    **sections: Any,
) -> Path:
    """Write a run folder; `committed` parts are committed (default: all), the others have files only."""
    config = configuration(out, part_size=part_size, **sections)
    table = census_table(prompts, evidence)
    content = {"models.generator": "generator:tiny@0123456789ab:64 px"}
    run = Run.open(config, content)
    read = sum(prompt.count for prompt in prompts)
    run.write_prompts(PromptTable(table.select(PROMPTS.names).cast(PROMPTS), read, ()), part_size)
    run.set_index(str(out / "index"), write_references(out / "index", references))
    for number in run.parts:
        folder = Path(run.folder.census_part(number))
        folder.mkdir(parents=True)
        rows = table.slice(number * part_size, part_size)
        step = max(1, part_size // 2)
        for half, start in enumerate(range(0, rows.num_rows, step)):
            pq.write_table(rows.slice(start, step), folder / f"{half}.parquet")
        if committed is None or number < committed:
            run.commit(number)
    if finished:
        run.finish()
    return out


def small_census() -> list[Planted]:
    """3 flagged, 1 with too few memorised generations, ordinary ones, 2 rejects."""
    return [
        Planted("a red fox", "VM VM VM NM", ("ref-1", "ref-2", "ref-1", "ref-7"), count=3),
        Planted("a blue door", "FM FM NM NM", ("ref-3",)),
        Planted("a quiet harbour at dawn", "BM BM BM BM", ("ref-4", "ref-5", "ref-6", "ref-4")),
        Planted("a chair", "VM NM NM NM", ("ref-1",), count=2),
        *(Planted(f"an ordinary caption {n}") for n in range(8)),
        Planted("", reason=Reason.CAPTION_EMPTY, count=5),
        Planted("a broken one", reason=Reason.GENERATION_NOT_FINITE),
    ]
