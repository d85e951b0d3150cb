"""This module is the command `memscan compare`, which compares two images, or a folder of images with an index."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.shared import AsJson, Overrides, World, configuration, guarded, show

if TYPE_CHECKING:
    from memscan.config import CensusConfig, MetricConfig
    from memscan.metric.calibration import Calibration
    from memscan.metric.comparison import Picture


class Variant(str, Enum):
    """These are the variants of the metric; docs/metric.md describes them."""

    PAPER = "paper"
    RELEASE = "release"
    REGION = "region"
    ROBUST = "robust"
    COMBINED = "combined"


MaskPath = Annotated[
    Path | None,
    typer.Option(
        metavar="PNG",
        help="Use this mask of the image's foreground, in white. Without it, the segmenter makes the mask.",
    ),
]


def compare(
    generated: Annotated[
        str | None, typer.Argument(metavar="GENERATED", help="This is an image file, or a folder of images.")
    ] = None,
    reference: Annotated[
        str | None, typer.Argument(metavar="REFERENCE", help="This is an image file, or the folder of an index.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv",
            help="Compare the pairs of this file. It has the columns generated and reference, and, if they are known, "
            "generated_mask, reference_mask and label. Its paths are relative to its folder.",
        ),
    ] = None,
    generated_mask: MaskPath = None,
    reference_mask: MaskPath = None,
    variant: Annotated[
        Variant | None,
        typer.Option(
            help="Use this variant of the metric. Without it, the configuration's variant is used, or combined."
        ),
    ] = None,
    canvas: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Resize images to a square with this side, in pixels. Without it, the configuration's canvas is "
            "used, or 128 (512 for paper and release).",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Use the calibrated thresholds of this file. Without it, those of the configuration are used, or the "
            "shipped ones.",
        ),
    ] = None,
    config_path: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="CONFIG.yaml",
            help="Take segmenter, embedder and metric from this census configuration.",
        ),
    ] = None,
    overrides: Overrides = None,
    world: World = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw images, masks, similarity maps and verdict into this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two images: one copies all of the other (VM), its foreground (FM), its background (BM), or none of it.

    With a folder and an index, the command searches the index for every image of the folder and compares the image with
    the references that it finds. The result is one line per image (with --json, one JSON object per line). With --pairs
    FILE.csv, every pair of the file is compared. The result is one JSON object per line, in the file's order. If the
    file has labels, a last line gives the figures: confusion matrix, F1 by class, false positives with their interval,
    AUC.
    """
    with guarded():
        from memscan.errors import ConfigError

        path = None if config_path is None else str(config_path)
        config = configuration(path, overrides, world) if path or world else None
        if pairs is not None:
            if any((generated, reference, generated_mask, reference_mask, figure)):
                raise ConfigError("images, masks and --figure belong to one pair, not to --pairs", where=pairs)
            _pairs(pairs, config, *_metric(config, variant, canvas, calibration))
            return
        if generated is None or reference is None:
            raise ConfigError("nothing to compare", hint="give GENERATED and REFERENCE, or --pairs FILE.csv")
        if Path(generated).is_dir():
            if generated_mask or reference_mask or figure:
                raise ConfigError("masks and --figure belong to one pair, not to a folder", where=generated)
            _folder(generated, reference, config, variant, canvas, calibration, as_json)
        else:
            metric_config, curve = _metric(config, variant, canvas, calibration)
            _pair(generated, reference, (generated_mask, reference_mask), config, metric_config, curve, figure, as_json)


def _metric(
    config: CensusConfig | None, variant: Variant | None, canvas: int | None, calibration: Path | None
) -> tuple[MetricConfig, Calibration | None]:
    """Return the metric of the options, and the calibration of its thresholds if there is one."""
    from memscan.config import FILLED, parse_metric, shipped_calibration
    from memscan.metric.calibration import Calibration

    given = config.metric if config else None
    same = given and (variant is None or variant.value == given.variant) and (canvas is None or canvas == given.canvas)
    if calibration is not None:
        found = Calibration.load(str(calibration))
        wanted = {"variant": variant.value if variant else found.variant, "canvas": canvas or found.canvas}
        undecided = {"foreground_threshold": 0.5, "background_threshold": 0.5}
        return found.apply(parse_metric({**wanted, **undecided}, where=str(calibration))), found
    if given and same:
        return given, None
    name = variant.value if variant else (given.variant if given else Variant.COMBINED.value)
    side = canvas or (given.canvas if given else 512 if name in FILLED else 128)
    shipped = shipped_calibration(name, side)
    chosen = parse_metric({"variant": name, "canvas": side}, where="--variant, --canvas")
    return chosen, Calibration.load(str(shipped)) if shipped.is_file() else None


def _pair(
    generated: str,
    reference: str,
    masks: tuple[Path | None, Path | None],
    config: CensusConfig | None,
    metric_config: MetricConfig,
    calibration: Calibration | None,
    figure: Path | None,
    as_json: bool,
) -> None:
    from memscan.metric.comparison import compare_pictures, draw, headline
    from memscan.metric.variants import load_metric

    spared = metric_config.masks == "reference"  # a generation needs no mask of its own
    own, other = _pictures((generated, reference), masks, config, spared)
    metric = load_metric(metric_config)
    found = compare_pictures(metric, own, other, calibration, _embedder(config, metric))
    if figure is not None:
        draw(found, figure)
    show(json.dumps(found.to_json(), indent=2) if as_json else headline(found))


def _pairs(path: str, config: CensusConfig | None, metric_config: MetricConfig, curve: Calibration | None) -> None:
    import torch

    from memscan.metric.variants import load_metric
    from memscan.models.segmenter import load_segmenter
    from memscan.worker.pairs import compare_pairs

    torch.set_num_threads(1)  # many small operations per pair: a second thread costs more than it gives
    segmenter = load_segmenter(config.segmenter) if config else None
    metric = load_metric(metric_config)
    rejected = 0
    for row in compare_pairs(path, metric, segmenter, curve, _embedder(config, metric)):
        rejected += row.get("status") == "rejected"
        show(json.dumps(row))
    if rejected:
        raise typer.Exit(1)


def _embedder(config: CensusConfig | None, metric: Any) -> Any:
    """Return the configured embedder if the metric was made for its similarities, otherwise None."""
    from memscan.models.embedder import load_embedder

    if config is None or metric.embedder is None or metric.embedder != config.embedder.name:
        return None
    return load_embedder(config.embedder)


def _pictures(
    paths: tuple[str, str], masks: tuple[Path | None, Path | None], config: CensusConfig | None, spared: bool
) -> tuple[Picture, Picture]:
    """Return both images with their masks, which are given or made by the segmenter.

    With `spared`, the generation gets no mask unless one is given.
    """
    from memscan.errors import ConfigError
    from memscan.metric.comparison import Picture, read_image, read_mask

    images = [read_image(path) for path in paths]
    missing = [at for at, mask in enumerate(masks) if mask is None and not (spared and at == 0)]
    if missing and config is None:
        names = " and ".join(("--generated-mask", "--reference-mask")[at] for at in missing)
        raise ConfigError(f"no mask and no segmenter for {paths[missing[0]]}", hint=f"give {names}, or --config")
    found: list[Any] = [None if mask is None else read_mask(mask, images[at]) for at, mask in enumerate(masks)]
    if missing and config is not None:
        from memscan.models.segmenter import load_segmenter

        segmenter = load_segmenter(config.segmenter)
        for at, mask in zip(missing, segmenter.segment([images[at] for at in missing]), strict=True):
            found[at] = mask
    first, second = (Picture(*entry) for entry in zip(paths, images, found, strict=True))
    return first, second


def _folder(
    folder: str,
    index: str,
    config: CensusConfig | None,
    variant: Variant | None,
    canvas: int | None,
    calibration: Path | None,
    as_json: bool,
) -> None:
    from memscan.errors import ConfigError
    from memscan.worker.folder import compare_folder

    if config is None:
        raise ConfigError("no segmenter and embedder to search with", where=folder, hint="give --config or --world")
    metric_config, _ = _metric(config, variant, canvas, calibration)
    rejected = 0
    for row in compare_folder(folder, index, config.model_copy(update={"metric": metric_config})):
        rejected += row["status"] != "done"
        show(json.dumps(row) if as_json else _line(row))
    if rejected:
        raise typer.Exit(1)


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "done":
        return f"rejected  {row['generated']}   {row['reason']}: {row['message']}"
    scores = row["scores"]
    return (
        f"{row['label']}   {row['generated']}   {row['reference']}   foreground {scores['foreground']:.3f}   "
        f"background {scores['background']:.3f}   margin {row['margin']:+.3f}"
    )
