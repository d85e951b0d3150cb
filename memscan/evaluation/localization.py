"""Localisation maps on a planted world, where the memorised pixels are known: the planted region's exact mask."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from memscan.evaluation.detectors import area_under_curve
from memscan.localization import maps
from memscan.models.checkpoint import load_unet
from memscan.models.denoiser import Denoiser
from memscan.models.generator import Generator
from memscan.models.taps import Signals
from memscan.planted.world import read_truth, world_config, world_folder, world_source
from memscan.records import Label, sample_seed

Maps = NDArray[np.float64]
ALL_ONES = "all_ones"


def evaluate_localization(
    world: str | Path | None = None,
    calibration: str | Path | None = None,
    *,
    probes: int = maps.PROBES,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Every map on one generation of each prompt whose memorised region is a part of the image (FM and BM).

    Truth is the planted region of the group's first training image on the latent grid. Maps are taken at the last step.

    Args:
        calibration: another world; each map's threshold is the one with the best mean IoU there.
        probes: K of Hutchinson's estimator.

    Returns:
        JSON values: for each map mean IoU at the fixed threshold (`iou`) and at the best one on the evaluated data
        (`iou_oracle`), AUC over pixels, `calls` a generation and `nan`, maps that are not finite.
    """
    truth_Nhw, found = _maps(world, probes, progress)
    fixed = _maps(calibration, probes, progress) if calibration is not None else None
    rows = {}
    for name, values_Nhw in found.items():
        finite = np.isfinite(values_Nhw).all(axis=(1, 2))
        values, truth = values_Nhw[finite], truth_Nhw[finite]
        row = {
            "calls": _calls(name, probes),
            "nan": int((~finite).sum()),
            "auc": area_under_curve(values[truth], values[~truth]),
            "iou_oracle": mean_iou(values, truth, best_threshold(values, truth)),
        }
        if fixed is not None:
            row["iou"] = mean_iou(values, truth, best_threshold(fixed[1][name], fixed[0]))
        rows[name] = row
    return {
        "world": world_source(world),
        "calibration": None if calibration is None else world_source(calibration),
        "generations": len(truth_Nhw),
        "probes": probes,
        "maps": rows,
    }


def mean_iou(values_Nhw: Maps, truth_Nhw: NDArray[np.bool_], threshold: float) -> float:
    """Mean over images of |map >= threshold and truth| / |either|."""
    marked = values_Nhw >= threshold
    both, either = (marked & truth_Nhw).sum(axis=(1, 2)), (marked | truth_Nhw).sum(axis=(1, 2))
    return float((both / np.maximum(either, 1)).mean())


def best_threshold(values_Nhw: Maps, truth_Nhw: NDArray[np.bool_]) -> float:
    """The quantile of the finite maps, of 200, with the best mean IoU."""
    finite = np.isfinite(values_Nhw).all(axis=(1, 2))
    values, truth = values_Nhw[finite], truth_Nhw[finite]
    candidates = np.unique(np.quantile(values, np.linspace(0, 0.995, 200)))
    return float(max(candidates, key=lambda one: mean_iou(values, truth, one)))


class _LastStep:
    """A tap that keeps where the last step began."""

    latents: torch.Tensor
    timestep: float

    def begin(self, count: int) -> None:
        """See `taps.Tap`."""

    def on_step(self, index: int, timestep: float, latents: torch.Tensor, *_noises: Any) -> None:
        self.latents, self.timestep = latents.clone(), timestep

    def result(self) -> Signals:
        return {}


def _maps(
    world: str | Path | None, probes: int, progress: Callable[[str], None]
) -> tuple[NDArray[np.bool_], dict[str, Maps]]:
    rows = [row for row in read_truth(world).to_pylist() if row["label"] in (Label.FM.value, Label.BM.value)]
    tap, captions = _LastStep(), [row["caption"] for row in rows]
    generator = Generator.load(world_config(world).generator, taps=[tap])
    parts = []
    size = generator.batch_size
    for at in range(0, len(rows), size):
        some = captions[at : at + size]
        generator.generate(some, [sample_seed(row["prompt_id"], 0) for row in rows[at : at + size]])
        parts.append(tap.latents)
    progress(f"{world_source(world)}: sampled")
    text, empty = generator.text_encoder(captions), generator.empty_text()
    denoiser = Denoiser(generator.checkpoint.unet, generator.scheduler)
    text, empty = text.copy(), None if empty is None else empty.copy()
    point = maps.Point(torch.cat(parts).clone(), denoiser.level(tap.timestep), text, empty)
    earlier = Denoiser(load_unet(world_folder(world) / "snapshot" / "unet"), generator.scheduler)
    found = {
        "caption_curvature": maps.caption_curvature(denoiser, point, probes=probes),
        "checkpoint_curvature": maps.checkpoint_curvature(denoiser, earlier, point, probes=probes),
        "curvature": maps.curvature(denoiser, point, probes=probes),
        "score_difference": maps.score_difference(denoiser, point),
        "checkpoint_difference": maps.checkpoint_difference(denoiser, earlier, point),
        "bright_ending": maps.bright_ending(denoiser, point, _ends(generator, captions)),
        ALL_ONES: torch.ones(point.x_BCHW[:, 0].shape),
    }
    progress(f"{world_source(world)}: maps")
    truth = _truth(world, rows, (point.x_BCHW.shape[2], point.x_BCHW.shape[3]))
    return truth, {name: values.double().numpy() for name, values in found.items()}


def _truth(world: str | Path | None, rows: list[dict[str, Any]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    table = pq.read_table(world_folder(world) / "references.parquet", columns=["reference_id", "mask"])
    masks = dict(zip(table["reference_id"].to_pylist(), table["mask"].to_pylist(), strict=True))
    out = []
    for row in rows:
        image = Image.open(io.BytesIO(masks[row["reference_ids"][0]])).convert("L")
        small = np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BOX)) >= 128
        out.append(small if row["label"] == Label.FM.value else ~small)
    return np.stack(out)


def _ends(generator: Generator, captions: list[str]) -> torch.Tensor:
    """Position of the first end token."""
    tokenizer, length = generator.checkpoint.tokenizer, generator.checkpoint.max_tokens
    ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    ends: torch.Tensor = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    return ends


def _calls(name: str, probes: int) -> int:
    """Denoiser calls a generation beyond the sampling's own; a product with the Jacobian counts as two."""
    curved = {"curvature": 1, "caption_curvature": 2, "checkpoint_curvature": 2}
    other = {"checkpoint_difference": 1}
    return curved[name] * (1 + 2 * probes) if name in curved else other.get(name, 0)


def localization_table(document: Mapping[str, Any]) -> str:
    """The evaluation as Markdown."""
    lines = [
        (
            f"{document['world']}: {document['generations']} generations, K = {document['probes']}. "
            f"Thresholds fixed on {document['calibration'] or 'no other world'}."
        ),
        "",
        "| map | calls more | IoU, fixed threshold | IoU, oracle | AUC a pixel | NaN |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in document["maps"].items():
        fixed = f"{row['iou']:.3f}" if "iou" in row else ""
        lines.append(
            f"| {name} | {row['calls']} | {fixed} | {row['iou_oracle']:.3f} | {row['auc']:.3f} | {row['nan']} |"
        )
    return "\n".join(lines)
