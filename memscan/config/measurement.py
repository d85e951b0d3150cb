"""How images are compared, how labels make a prompt's verdict, and how flagged prompts are grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from memscan.config.base import Section

# Variants that compare canvases filled outside their region, with the published thresholds.
FILLED = ("paper", "release")
COMBINED = 128  # the canvas of `combined` where none is given


class MetricConfig(Section):
    """FB-Mem (Di et al. 2025). Thresholds hold for one variant, canvas, segmenter and generator: calibrate.

    Where none are given, `paper` and `release` have the published ones, `region` and `robust` those that ship for their
    canvas and masks, and `combined` its operating point; for another canvas both must be given.
    """

    variant: Literal["paper", "release", "region", "robust", "combined"] = Field(
        "combined",
        description='How a pair of regions is scored: "paper" fills canvases as published, "release" as the authors\' '
        'scripts do, "region" takes the mean of one SSIM map inside each region, "robust" compares aligned structure, '
        '"combined" weighs the last two; docs/metric.md compares them. When it is not given, "combined" is taken, but '
        '"paper" where the section gives a canvas or a threshold, as it always meant.',
    )
    canvas: int = Field(
        128,
        ge=32,
        description='The side of the square that both images are resized to, in pixels; "paper" and "release" need at '
        'least 176, "robust" a multiple of 64, "combined" one that weights ship for. When it is not given, it is '
        '128 for "combined" and 512 for the others.',
    )
    masks: Literal["own", "reference"] = Field(
        "own",
        description='The masks that cut the images of a pair: "own" takes each image\'s own, "reference" lays the '
        "reference's on both, so that a generation needs no mask to be scored and two masks of one picture cannot "
        'disagree. When it is not given, it is "reference" for "combined", which has no other, and "own" for the '
        'others; "paper" and "release" have only that.',
    )
    foreground_threshold: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="The foreground score from which on a foreground counts as copied. When it is not given, "
        '"region" and "robust" take the one that ships for their canvas.',
    )
    background_threshold: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="The background score from which on a background counts as copied. When it is not given, "
        '"region" and "robust" take the one that ships for their canvas.',
    )
    degenerate_area: float = Field(
        0.03,
        ge=0,
        lt=0.5,
        description="The share of the image, in [0, 0.5), below which a region has no score of its own and takes that "
        "of the other region.",
    )
    threshold_source: str = Field(
        "published", description="Where the thresholds come from, in words; the report prints it."
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_values(cls, data: Any) -> Any:
        """What a section means that leaves keys out: by its variant."""
        if not isinstance(data, dict):
            return data
        written = {"canvas", "foreground_threshold", "background_threshold"} & set(data)
        variant = data.get("variant", "paper" if written else "combined")
        combined = variant == "combined"
        usual = {
            "variant": variant,
            "canvas": COMBINED if combined else 512,
            "masks": "reference" if combined else "own",
        }
        data = {**usual, **data}
        if variant in ("region", "robust"):
            return _with_shipped_thresholds(data)
        if combined:
            threshold = {"foreground_threshold": 0.5, "background_threshold": 0.5}
            source = "shipped with memscan: the operating point of the weights on real pairs, docs/metric.md"
            return {**threshold, "threshold_source": source, **data}
        return data

    @model_validator(mode="after")
    def _room_for_scales(self) -> MetricConfig:
        if self.variant in FILLED and self.canvas < 176:
            raise ValueError("five MS-SSIM scales need a canvas of at least 176")
        if self.variant in FILLED and self.masks == "reference":
            raise ValueError(f"{self.variant} cuts each image by its own mask: metric.masks must be own")
        if self.variant == "robust" and self.canvas % 64:
            raise ValueError("robust has a grid of 64 cells: its canvas is a multiple of 64")
        if self.variant == "combined" and self.masks == "own":
            raise ValueError("combined cuts both images by the reference's mask: metric.masks must be reference")
        if self.variant == "combined" and self.canvas != COMBINED and not shipped_weights_path(self.canvas).is_file():
            known = ", ".join(map(str, _shipped_canvases("weights")))
            raise ValueError(f"weights of combined ship for canvases {known}, not for {self.canvas}")
        return self


class VerdictConfig(Section):
    """How the labels of a prompt's generations make the prompt's verdict."""

    min_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="The share of a prompt's generations, in (0, 1], that must have a label other than NM for the "
        "prompt to be flagged.",
    )
    harm: dict[Literal["VM", "FM", "BM", "NM"], float] = Field(
        {"VM": 2.0, "FM": 1.5, "BM": 0.5, "NM": 0.0},
        description="What one generation of each label adds to a prompt's severity, which is the mean over its "
        "generations. A label that is left out keeps its published value, the default.",
    )


class ClustersConfig(Section):
    """How flagged prompts are grouped. Nothing here touches what was scanned: reduce again with another choice."""

    encoder: Literal["model", "sentence", "words"] = Field(
        "model",
        description='What turns captions into vectors: "model" is the text encoder of the checkpoint, pooled; '
        '"sentence" is the sentence encoder at `path`; "words" counts words and needs no model.',
    )
    path: str | None = Field(
        None,
        description="The folder or hub id of the sentence encoder (transformers, safetensors); only "
        "`encoder: sentence` takes it, and needs it.",
    )
    revision: str | None = Field(None, description="The commit of a hub id, which is required for one.")
    image_weight: float = Field(
        0.75,
        ge=0,
        le=1,
        description="How far prompts that share training images are drawn together, in [0, 1]; with 0 only their texts "
        "count.",
    )
    min_cluster_size: int = Field(3, ge=2, description="The smallest number of prompts that make a cluster.")
    min_samples: int = Field(
        1,
        ge=1,
        description="The number of neighbours of HDBSCAN's core distance; a higher number leaves more prompts without "
        "a cluster.",
    )
    kmeans: int = Field(
        12,
        ge=0,
        description="The number of clusters of the published k-means variant, which is reported beside the clusters; "
        "with 0 it is left out.",
    )
    direct: int = Field(
        10_000,
        ge=0,
        description="The number of flagged prompts up to which distances are exact; more prompts are clustered on a "
        "FAISS graph of nearest neighbours.",
    )

    @model_validator(mode="after")
    def _path_of_a_sentence_encoder(self) -> ClustersConfig:
        if (self.encoder == "sentence") != (self.path is not None):
            raise ValueError("clusters.path belongs to clusters.encoder: sentence, and is needed there")
        return self


def shipped_rate(metric: MetricConfig) -> dict[str, Any] | None:
    """How many ordinary pairs the thresholds call alike, where they are those that ship with the package; else None.

    Returns:
        rate (share), bound (its upper 95 % bound) and ordinary (number of pairs that are no copies), of the set that
        the thresholds were calibrated on.
    """
    file = shipped_calibration(metric.variant, metric.canvas, metric.masks)
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    if any(facts[name] != getattr(metric, name) for name in ("foreground_threshold", "background_threshold")):
        return None
    found = {name: facts.get(f"false_positive_{name}") for name in ("rate", "bound")}
    ordinary = (facts.get("counts") or {}).get("NM")
    return None if None in (*found.values(), ordinary) else {**found, "ordinary": ordinary}


def _with_shipped_thresholds(data: dict[str, Any]) -> dict[str, Any]:
    given = [key for key in ("foreground_threshold", "background_threshold") if key in data]
    if len(given) == 2:
        return data
    variant, canvas, masks = data["variant"], data["canvas"], data["masks"]
    file = shipped_calibration(variant, canvas, masks)
    if given or not file.is_file():
        known = ", ".join(map(str, _shipped_canvases(file.stem.rpartition("-")[0]))) or "none"
        raise ValueError(
            f"{variant} on a canvas of {canvas} needs foreground_threshold and background_threshold: with masks "
            f"{masks}, thresholds ship for canvases {known}; others are calibrated"
        )
    facts = json.loads(file.read_text(encoding="utf-8"))
    return {
        "threshold_source": f"shipped with memscan: {facts['source']}",
        **data,
        **{key: facts[key] for key in ("foreground_threshold", "background_threshold")},
    }


SHIPPED = Path(__file__).parent.parent / "metric" / "shipped"


def shipped_calibration(variant: str, canvas: int, masks: str = "own") -> Path:
    """Where the thresholds of a variant on a canvas would be that ship with the package; the file need not exist."""
    under = "-reference" if masks == "reference" and variant != "combined" else ""
    return SHIPPED / f"{variant}{under}-{canvas}.json"


def shipped_weights_path(canvas: int) -> Path:
    """Where the weights of `combined` on a canvas would be that ship with the package; the file need not exist."""
    return SHIPPED / f"weights-{canvas}.json"


def _shipped_canvases(stem: str) -> list[int]:
    sides = (file.stem.removeprefix(f"{stem}-") for file in SHIPPED.glob(f"{stem}-*.json"))
    return sorted(int(side) for side in sides if side.isdecimal())
