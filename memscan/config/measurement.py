"""How images are compared, how labels make a prompt's verdict, and how flagged prompts are grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from memscan.config.base import Section


class MetricConfig(Section):
    """FB-Mem (Di et al. 2025). Thresholds hold for one variant, canvas, segmenter and generator: calibrate.

    Where none are given, `paper` has the published ones, `region` and `robust` those that ship for their canvas (from
    rendered pairs and photographs with exact masks); for another canvas both must be given.
    """

    variant: Literal["paper", "region", "robust"] = Field(
        "paper",
        description='How a pair of regions is scored: "paper" fills canvases as published, "region" takes the mean of '
        'one SSIM map inside each region, "robust" compares aligned structure; docs/metric.md compares them.',
    )
    canvas: int = Field(
        512,
        ge=32,
        description='The side of the square that both images are resized to, in pixels; "paper" needs at least 176, '
        '"robust" a multiple of 64.',
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
    def _shipped_thresholds(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("variant", "paper") not in ("region", "robust"):
            return data
        given = [key for key in ("foreground_threshold", "background_threshold") if key in data]
        if len(given) == 2:
            return data
        file = shipped_calibration(data["variant"], data.get("canvas", 512))
        if given or not file.is_file():
            known = ", ".join(sorted(f.stem.rpartition("-")[2] for f in file.parent.glob(f"{data['variant']}-*.json")))
            raise ValueError(
                f"{data['variant']} on a canvas of {data.get('canvas', 512)} needs foreground_threshold and "
                f"background_threshold: thresholds ship for canvases {known or 'none'}; others are calibrated"
            )
        facts = json.loads(file.read_text(encoding="utf-8"))
        return {
            "threshold_source": f"shipped with memscan: {facts['source']}, exact masks",
            **data,
            **{key: facts[key] for key in ("foreground_threshold", "background_threshold")},
        }

    @model_validator(mode="after")
    def _room_for_scales(self) -> MetricConfig:
        if self.variant == "paper" and self.canvas < 176:
            raise ValueError("five MS-SSIM scales need a canvas of at least 176")
        if self.variant == "robust" and self.canvas % 64:
            raise ValueError("robust has a grid of 64 cells: its canvas is a multiple of 64")
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
    file = shipped_calibration(metric.variant, metric.canvas)
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    if any(facts[name] != getattr(metric, name) for name in ("foreground_threshold", "background_threshold")):
        return None
    return {
        "rate": facts["false_positive_rate"],
        "bound": facts["false_positive_bound"],
        "ordinary": facts["counts"]["NM"],
    }


def shipped_calibration(variant: str, canvas: int) -> Path:
    """Where the thresholds of a variant on a canvas would be that ship with the package; the file need not exist."""
    return Path(__file__).parent.parent / "metric" / "shipped" / f"{variant}-{canvas}.json"
