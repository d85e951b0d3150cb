"""A complete census: all sections together, and the fingerprint of what decides its results."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, model_validator

from memscan.config.base import Section
from memscan.config.inputs import IndexConfig, PromptsConfig
from memscan.config.measurement import ClustersConfig, MetricConfig, VerdictConfig
from memscan.config.models import EmbedderConfig, GeneratorConfig, SegmenterConfig
from memscan.config.resources import ResourcesConfig
from memscan.config.screening import ScreenConfig, SignalsConfig

# What `content`, and so the fingerprint, leaves out: the run's name and place, what only decides how fast it is, and
# what only the reduce reads; and keys that ask for a look at something, which changes nothing of what is made.
PLACE = ("name", "out")
RESOURCES = ("resources",)
REDUCE_ONLY = ("verdict", "clusters")
CHECKS = ("generator.sanity",)


class CensusConfig(Section):
    """A complete census."""

    name: str = Field(
        "census",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="The name of the run in reports: letters, digits, dots, dashes and underscores.",
    )
    out: str = Field("runs/census", description="The run folder, local or s3://.")
    prompts: PromptsConfig = Field(description="The captions that are scanned.")
    generator: GeneratorConfig = Field(description="The checkpoint under census, and how it is sampled.")
    segmenter: SegmenterConfig = Field(description="The model that separates foreground from background.")
    embedder: EmbedderConfig = Field(description="The copy-detection model that turns images into vectors.")
    index: IndexConfig = Field(description="The reference images and their index.")
    metric: MetricConfig = Field(
        MetricConfig(), description="How a generation is compared with a reference image, and from which score on."
    )
    screen: ScreenConfig | None = Field(
        None,
        description="The screen that decides which prompts are scanned in full. When it is not given, every prompt is.",
    )
    signals: SignalsConfig = Field(
        SignalsConfig(), description="The detector signals that a scan takes beside the noise norms."
    )
    verdict: VerdictConfig = Field(VerdictConfig(), description="How labels of generations make a prompt's verdict.")
    clusters: ClustersConfig = Field(ClustersConfig(), description="How flagged prompts are grouped.")
    resources: ResourcesConfig = Field(ResourcesConfig(), description="What a run may use of the machines.")
    part_size: int = Field(
        10_000, ge=1, description="The number of prompts in one part, which is what a run commits at once."
    )

    @model_validator(mode="after")
    def _screen_fits(self) -> CensusConfig:
        screen = self.screen
        if screen is None:
            return self
        if screen.detector == "seed_similarity" and screen.seeds < 2:
            raise ValueError("screen.detector seed_similarity needs two seeds")
        if screen.detector in ("noise_norm", "anisotropy", "sharpness") and self.generator.guidance <= 1:
            raise ValueError(
                f"screen.detector {screen.detector} needs guidance: set generator.guidance above 1, or another detector"
            )
        if screen.first_samples is not None and screen.first_samples > self.generator.samples:
            raise ValueError("screen.first_samples is more than generator.samples")
        if screen.first_samples is not None and self.resources.judges:
            raise ValueError("screen.first_samples needs judging where the sampling is: leave out resources.judges")
        return self

    def content(self) -> dict[str, Any]:
        """All that decides the results, as JSON: not name or place, the resources, or what only the reduce reads.

        A census without a screen, sampled by our own loop, or with the usual signals, has the content that it had
        before there were others; the scheduler of a stock pipeline stands in the generator's identity.
        """
        content = self.model_dump(mode="json", exclude={*PLACE, *RESOURCES, *REDUCE_ONLY})
        for section, _, name in (key.partition(".") for key in CHECKS):
            del content[section][name]
        if content["screen"] is None:
            del content["screen"]
        if self.signals == SignalsConfig():
            del content["signals"]
        if self.metric.masks == "own":  # as it was before there was a choice
            del content["metric"]["masks"]
        generator = content["generator"]
        generator["scheduler"] = self.generator.own_scheduler
        for key in ("adapter", "negative_prompt", "base", "loras", "textual_inversions", "clip_skip"):
            if generator[key] == GeneratorConfig.model_fields[key].default:
                del generator[key]
        segmenter = content["segmenter"]
        for key in ("preset", "mean", "std", "divide", "activation", "output"):
            if getattr(self.segmenter, key) == SegmenterConfig.model_fields[key].default:
                del segmenter[key]
        if content["prompts"]["header"]:
            del content["prompts"]["header"]
        for later in ("image_root", "id_column", "image_column", "caption_column", "url_column", "id_prefix"):
            if content["index"][later] is None:
                del content["index"][later]
        return content

    def fingerprint(self) -> str:
        """Hash of `content`."""
        content = self.content()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
