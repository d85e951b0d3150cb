"""This module configures how images are compared, how labels make a verdict, and how flagged prompts are grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from memscan.config.base import Section

# Variants that compare canvases filled outside their region, with the published thresholds.
FILLED = ("paper", "release")
COMBINED = 128  # the canvas of `combined` if none is given


class MetricConfig(Section):
    """This section describes the metric, FB-Mem (Di et al. 2025).

    A threshold is valid for one variant, canvas, segmenter and generator, so calibrate your own. If no thresholds are
    given, `paper` and `release` use the published ones, `region` and `robust` use those that ship for their canvas and
    masks, and `combined` uses its operating point. For another canvas, both thresholds must be given.
    """

    variant: Literal["paper", "release", "region", "robust", "combined"] = Field(
        "combined",
        description='This key says how a pair of regions is scored. "paper" fills canvases as published, "release" '
        'fills them as the authors\' scripts do, "region" takes the mean of one SSIM map inside each region, "robust" '
        'compares aligned structure, and "combined" weighs the last two. docs/metric.md compares them. If it is not '
        'given, "combined" is used; but "paper" is used if the section gives a canvas or a threshold, so that older '
        "configurations keep their meaning.",
    )
    canvas: int = Field(
        128,
        ge=32,
        description='Both images are resized to a square with this side, in pixels. "paper" and "release" need at '
        'least 176, "robust" needs a multiple of 64, and "combined" needs a side for which weights ship. If it is not '
        'given, it is 128 for "combined" and 512 for the others.',
    )
    masks: Literal["own", "reference"] = Field(
        "own",
        description='This key says which masks cut the images of a pair. "own" uses each image\'s own mask. '
        '"reference" uses the reference\'s mask for both images, so that a generation needs no mask, and two masks of '
        'one picture cannot disagree. If it is not given, it is "reference" for "combined" and "own" for the others. '
        '"combined" accepts only "reference"; "paper" and "release" accept only "own".',
    )
    foreground_threshold: float = Field(
        0.8,
        gt=0,
        lt=1,
        description='A foreground with this score or a higher one counts as copied. If it is not given, "region" and '
        '"robust" use the threshold that ships for their canvas.',
    )
    background_threshold: float = Field(
        0.8,
        gt=0,
        lt=1,
        description='A background with this score or a higher one counts as copied. If it is not given, "region" and '
        '"robust" use the threshold that ships for their canvas.',
    )
    degenerate_area: float = Field(
        0.03,
        ge=0,
        lt=0.5,
        description="A region that covers a smaller share of the image than this, in [0, 0.5), has no score of its "
        "own and takes that of the other region.",
    )
    threshold_source: str = Field(
        "published", description="This text says where the thresholds come from; the report prints it."
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_values(cls, data: Any) -> Any:
        """Fill in the keys that a section leaves out; the variant decides their values."""
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
    """This section says how the labels of a prompt's generations make the prompt's verdict."""

    min_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="A prompt is flagged if at least this share of its generations, in (0, 1], has a label other than "
        "NM.",
    )
    harm: dict[Literal["VM", "FM", "BM", "NM"], float] = Field(
        {"VM": 2.0, "FM": 1.5, "BM": 0.5, "NM": 0.0},
        description="This is the harm of one generation of each label. A prompt's severity is the mean harm of its "
        "generations. A label that is left out keeps its published value, which is the default.",
    )


class ClustersConfig(Section):
    """This section says how flagged prompts are grouped. It changes no scan, so reduce again to try other values."""

    encoder: Literal["model", "sentence", "words"] = Field(
        "model",
        description='This key says what turns captions into vectors. "model" is the text encoder of the checkpoint, '
        'pooled; "sentence" is the sentence encoder at `path`; "words" counts words and needs no model.',
    )
    path: str | None = Field(
        None,
        description="This is the folder or hub id of the sentence encoder (transformers, safetensors). `encoder: "
        "sentence` needs it, and no other encoder accepts it.",
    )
    revision: str | None = Field(None, description="This is the commit of a hub id. A hub id requires it.")
    image_weight: float = Field(
        0.75,
        ge=0,
        le=1,
        description="This weight, in [0, 1], says how far prompts that share training images are moved together. With "
        "0, only their texts count.",
    )
    min_cluster_size: int = Field(3, ge=2, description="A cluster has at least this number of prompts.")
    min_samples: int = Field(
        1,
        ge=1,
        description="HDBSCAN's core distance uses this number of neighbours. A higher number leaves more prompts "
        "without a cluster.",
    )
    kmeans: int = Field(
        12,
        ge=0,
        description="The published k-means variant, which is reported beside the clusters, makes this number of "
        "clusters. With 0 it is left out.",
    )
    direct: int = Field(
        10_000,
        ge=0,
        description="Distances are exact up to this number of flagged prompts. More prompts are clustered on a FAISS "
        "graph of nearest neighbours.",
    )

    @model_validator(mode="after")
    def _path_of_a_sentence_encoder(self) -> ClustersConfig:
        if (self.encoder == "sentence") != (self.path is not None):
            raise ValueError("clusters.path belongs to clusters.encoder: sentence, and is needed there")
        return self


def shipped_rate(metric: MetricConfig) -> dict[str, Any] | None:
    """Return how many ordinary pairs the thresholds label as copies, if they are those that ship with the package.

    Returns:
        None for other thresholds. Otherwise `rate` (a share), `bound` (its upper 95 % bound) and `ordinary` (the number
        of pairs that are no copies), all on the set with which the thresholds were calibrated.
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
    """Return where the package keeps the thresholds of a variant on a canvas; the file need not exist."""
    under = "-reference" if masks == "reference" and variant != "combined" else ""
    return SHIPPED / f"{variant}{under}-{canvas}.json"


def shipped_weights_path(canvas: int) -> Path:
    """Return where the package keeps the weights of `combined` on a canvas; the file need not exist."""
    return SHIPPED / f"weights-{canvas}.json"


def _shipped_canvases(stem: str) -> list[int]:
    sides = (file.stem.removeprefix(f"{stem}-") for file in SHIPPED.glob(f"{stem}-*.json"))
    return sorted(int(side) for side in sides if side.isdecimal())
