"""This module measures localisation maps where the memorised pixels are known: on planted worlds, or on given masks.

Maps are made at several steps of several generations of a prompt, and are used in several settings: the map of one
generation or the mean over all, raw or as a share of its own maximum. The best setting on the other world is fixed
there, together with the threshold. The published setting (last step, one generation, raw) is reported beside it.
Prompts that are not memorised are sampled as well, and whatever a map marks for them is a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memscan.evaluation.detectors import area_under_curve
from memscan.evaluation.subjects import Subject, planted_subject
from memscan.localization import maps
from memscan.localization.seed_agreement import seed_agreement
from memscan.models.checkpoint import load_unet
from memscan.models.denoiser import Denoiser
from memscan.models.generator import Generator
from memscan.models.hooks import Signals
from memscan.planted.world import check_apart
from memscan.records import sample_seed

Maps = NDArray[np.float64]
ALL_ONES, AGREEMENT = "all_ones", "seed_agreement"


@dataclass(frozen=True)
class Setting:
    """A setting says how a map is read.

    Args:
        timestep: of the denoiser call it is taken at; None for a map of finished images.
        generations: over which it is a mean.
        relative: whether it is divided by its own maximum.
    """

    timestep: float | None
    generations: int
    relative: bool

    def __str__(self) -> str:
        at = "images" if self.timestep is None else f"t = {self.timestep:g}"
        return f"{at}, {self.generations} gen." + (", relative" if self.relative else "")


@dataclass(frozen=True)
class _Read:
    """Maps of one subject.

    Attributes:
        truth_Phw: the memorised cells of P prompts.
        maps, ordinary: by name and setting, (P, h, w), of memorised prompts and of the others.
        nan: maps that are not finite, by name.
        published: the published setting.
    """

    truth_Phw: NDArray[np.bool_]
    maps: dict[str, dict[Setting, Maps]]
    ordinary: dict[str, dict[Setting, Maps]]
    nan: dict[str, int]
    published: Setting


def evaluate_localization(
    world: str | Path | None = None,
    calibration: str | Path | None = None,
    *,
    probes: int = maps.PROBES,
    seeds: int = 4,
    points: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return every map of a planted world's FM and BM prompts, whose memorised region is a part of the image, and of as
    many NM prompts. Arguments and results are those of `evaluate_maps`.

    Raises:
        ValueError: fewer than two seeds or points.
        ModelError, ConfigError: as `planted.world.check_apart` does.
    """
    check_apart(world, calibration)
    fixed = None if calibration is None else planted_subject(calibration)
    numbers = {"probes": probes, "seeds": seeds, "points": points}
    return evaluate_maps(planted_subject(world), fixed, **numbers, progress=progress)


def evaluate_maps(
    subject: Subject,
    calibration: Subject | None = None,
    *,
    probes: int = maps.PROBES,
    seeds: int = 4,
    points: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return every map of a subject's prompts.

    Args:
        calibration: another subject; each map's setting and threshold are those with the best mean IoU there.
        probes: K of Hutchinson's estimator.
        seeds: generations of a prompt, at least two.
        points: steps at which maps are taken, evenly from the first to the last.

    Returns:
        JSON values: for each map `calls` a generation beyond the sampling's own, `nan` (maps that are not finite),
        `settings` (AUC over cells and mean IoU at the best threshold of the evaluated data, `iou_oracle`; with a
        calibration `iou`, at the threshold fixed there; where there are ordinary prompts `false_alarms`, how many of
        them have a cell marked at that threshold, and `false_area`, the mean share of their cells), `published` and,
        with a calibration, `chosen`: the indices of two of them.

    Raises:
        ValueError: fewer than two seeds or points.
    """
    if min(seeds, points) < 2:
        raise ValueError("localisation is evaluated on two seeds and two steps at least")
    found = _read(subject, probes, seeds, points, progress)
    fixed = None if calibration is None else _read(calibration, probes, seeds, points, progress)
    rows = {}
    for name, by_setting in found.maps.items():
        settings = list(by_setting)
        row: dict[str, Any] = {"calls": _calls(name, probes), "nan": found.nan[name]}
        row["published"] = settings.index(found.published) if found.published in settings else 0
        row["settings"] = [asdict(one) | _figures(by_setting[one], found.truth_Phw) for one in settings]
        thresholds = [best_threshold(by_setting[one], found.truth_Phw) for one in settings]
        if fixed is not None and name in fixed.maps:
            thresholds = [best_threshold(fixed.maps[name][one], fixed.truth_Phw) for one in settings]
            there = [
                mean_iou(fixed.maps[name][one], fixed.truth_Phw, threshold)
                for one, threshold in zip(settings, thresholds, strict=True)
            ]
            for at, (one, threshold) in enumerate(zip(settings, thresholds, strict=True)):
                row["settings"][at] |= {
                    "iou": mean_iou(by_setting[one], found.truth_Phw, threshold),
                    "threshold": threshold,
                    "iou_calibration": there[at],
                }
            row["chosen"] = int(np.argmax(there))
        for at, (one, threshold) in enumerate(zip(settings, thresholds, strict=True)):
            row["settings"][at] |= false_alarms(found.ordinary[name][one], threshold)
        rows[name] = row
    return {
        "world": subject.name,
        "calibration": None if calibration is None else calibration.name,
        "prompts": len(found.truth_Phw),
        "ordinary": len(subject.captions) - subject.memorised,
        "generations": seeds,
        "probes": probes,
        "memorised_share": float(found.truth_Phw.mean()),
        "maps": rows,
    }


def _figures(values: Maps, truth: NDArray[np.bool_]) -> dict[str, float | None]:
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.any():
        return {"auc": None, "iou_oracle": None}
    values, truth = values[finite], truth[finite]
    return {
        "auc": area_under_curve(values[truth], values[~truth]),
        "iou_oracle": mean_iou(values, truth, best_threshold(values, truth)),
    }


def mean_iou(values_Nhw: Maps, truth_Nhw: NDArray[np.bool_], threshold: float) -> float:
    """Return the mean over images of |map >= threshold and truth| / |either|.

    A map that is not finite marks nothing.
    """
    finite_N11 = np.isfinite(values_Nhw).all(axis=(1, 2), keepdims=True)
    marked = (values_Nhw >= threshold) & finite_N11
    both, either = (marked & truth_Nhw).sum(axis=(1, 2)), (marked | truth_Nhw).sum(axis=(1, 2))
    return float((both / np.maximum(either, 1)).mean())


def false_alarms(values_Nhw: Maps, threshold: float) -> dict[str, Any]:
    """Return how many of N ordinary prompts have a cell at the threshold, and the mean share of such cells."""
    if not len(values_Nhw):
        return {}
    marked_Nhw = (values_Nhw >= threshold) & np.isfinite(values_Nhw).all(axis=(1, 2), keepdims=True)
    return {"false_alarms": int(marked_Nhw.any(axis=(1, 2)).sum()), "false_area": float(marked_Nhw.mean())}


def best_threshold(values_Nhw: Maps, truth_Nhw: NDArray[np.bool_]) -> float:
    """Return the quantile of the finite maps, of 200, with the best mean IoU; without any, one that marks nothing."""
    finite = np.isfinite(values_Nhw).all(axis=(1, 2))
    if not finite.any():
        return float(np.finfo(np.float64).max)
    values, truth = values_Nhw[finite], truth_Nhw[finite]
    candidates = np.unique(np.quantile(values, np.linspace(0, 0.995, 200)))
    return float(max(candidates, key=lambda one: mean_iou(values, truth, one)))


class _Steps:
    """This is a hook that keeps where every step began."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, torch.Tensor]] = []

    def begin(self, count: int) -> None:
        self.seen = []

    def on_step(self, index: int, timestep: float, latents: torch.Tensor, *_noises: Any) -> None:
        self.seen.append((timestep, latents.clone()))

    def result(self) -> Signals:
        return {}


def _read(subject: Subject, probes: int, seeds: int, points: int, progress: Callable[[str], None]) -> _Read:
    hook = _Steps()
    generator = Generator.load(subject.generator, hooks=[hook])
    captions = [caption for caption in subject.captions for _ in range(seeds)]
    numbers = [sample_seed(prompt, number) for prompt in subject.prompt_ids for number in range(seeds)]
    parts, images = [], []
    for at in range(0, len(captions), generator.batch_size):
        span = slice(at, at + generator.batch_size)
        images.append(generator.generate(captions[span], numbers[span]).images_BHWC)
        parts.append(hook.seen)
    progress(f"{subject.name}: sampled")
    size = generator.height, generator.width
    denoiser = Denoiser.of(generator.checkpoint.unet, generator.scheduler, size=size)
    earlier = None
    if subject.earlier is not None:
        earlier = Denoiser.of(load_unet(subject.earlier, torch.float32), generator.scheduler)
    empty = generator.empty_text()
    text, empty = generator.text_encoder(captions).copy(), None if empty is None else empty.copy()
    taken: dict[str, dict[float, Maps]] = {}
    for index in np.linspace(0, len(parts[0]) - 1, points).round().astype(int):
        timestep = parts[0][index][0]
        x_BCHW = torch.cat([part[index][1] for part in parts]).clone()
        point = maps.Point(x_BCHW, denoiser.level(timestep), text, empty)
        for name, values in _at(point, denoiser, earlier, probes).items():
            shaped = values.double().reshape(len(subject.captions), seeds, *values.shape[1:]).numpy()
            taken.setdefault(name, {})[timestep] = shaped
        progress(f"{subject.name}: maps at t = {timestep:g}")
    shape = next(iter(taken[ALL_ONES].values())).shape[2:]
    read = {name: _settings(values, seeds) for name, values in taken.items()}
    pictures_PSHWC = np.concatenate(images).reshape(len(subject.captions), seeds, *images[0].shape[1:])
    agreed = np.stack([seed_agreement(one, shape) for one in pictures_PSHWC]).astype(np.float64)
    read[AGREEMENT] = {Setting(None, seeds, False): agreed}
    nan = {
        name: sum(int((~np.isfinite(one).all(axis=(2, 3))).sum()) for one in values.values())
        for name, values in taken.items()
    }
    published = Setting(parts[0][-1][0], 1, False)
    memorised, ordinary = (
        {name: {one: values[part] for one, values in by_setting.items()} for name, by_setting in read.items()}
        for part in (slice(None, subject.memorised), slice(subject.memorised, None))
    )
    return _Read(subject.regions(shape), memorised, ordinary, nan | {AGREEMENT: 0}, published)


def _at(point: maps.Point, denoiser: Denoiser, earlier: Denoiser | None, probes: int) -> dict[str, torch.Tensor]:
    assert point.text.ends_N is not None
    compared = {}
    if earlier is not None:
        compared = {
            "checkpoint_curvature": maps.checkpoint_curvature(denoiser, earlier, point, probes=probes),
            "checkpoint_difference": maps.checkpoint_difference(denoiser, earlier, point),
        }
    return {
        "caption_curvature": maps.caption_curvature(denoiser, point, probes=probes),
        "curvature": maps.curvature(denoiser, point, probes=probes),
        "score_difference": maps.score_difference(denoiser, point),
        **compared,
        "bright_ending": maps.bright_ending(denoiser, point, point.text.ends_N),
        ALL_ONES: torch.ones(point.x_BCHW[:, 0].shape),
    }


def _settings(values: dict[float, Maps], seeds: int) -> dict[Setting, Maps]:
    """Return the readings of one map; values by timestep, (P, S, h, w)."""
    read = {}
    for timestep, values_PShw in values.items():
        for count in (1, seeds):
            mean_Phw = values_PShw[:, :count].mean(axis=1)
            most_P11 = mean_Phw.max(axis=(1, 2), keepdims=True)
            read[Setting(timestep, count, False)] = mean_Phw
            read[Setting(timestep, count, True)] = mean_Phw / np.where(most_P11 > 0, most_P11, 1)
    return read


def _calls(name: str, probes: int) -> int:
    """Denoiser calls per generation beyond the sampling's own; a product with the Jacobian counts as two."""
    curved = {"curvature": 1, "caption_curvature": 2, "checkpoint_curvature": 2}
    other = {"checkpoint_difference": 1}
    return curved[name] * (1 + 2 * probes) if name in curved else other.get(name, 0)


def localization_table(document: Mapping[str, Any]) -> str:
    """Return the evaluation as Markdown: each map as published, and in the setting that the calibration world chose."""
    lines = [
        (
            f"{document['world']}: {document['prompts']} memorised and {document['ordinary']} ordinary prompts, "
            f"{document['generations']} generations each, "
            f"K = {document['probes']}, {document['memorised_share']:.1%} of the cells memorised. "
            f"Settings and thresholds fixed on {document['calibration'] or 'no other world'}."
        ),
        "",
        "| map | more calls | setting | IoU, fixed threshold | IoU, oracle | cell AUC | false alarms, cells | NaN |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in document["maps"].items():
        for at in dict.fromkeys((row["published"], row.get("chosen", row["published"]))):
            one = row["settings"][at]
            setting = Setting(one["timestep"], one["generations"], one["relative"])
            fixed = f"{one['iou']:.3f}" if "iou" in one else ""
            label = name if at == row["published"] else f"{name}, chosen"
            known = " | " if one["auc"] is None else f"{one['iou_oracle']:.3f} | {one['auc']:.3f}"
            alarms = f"{one['false_alarms']}, {one['false_area']:.1%}" if "false_alarms" in one else ""
            figures = f"{fixed} | {known} | {alarms} | {row['nan']}"
            lines.append(f"| {label} | {row['calls'] * setting.generations} | {setting} | {figures} |")
    return "\n".join(lines)
