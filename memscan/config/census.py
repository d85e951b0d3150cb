"""This module is the configuration of a complete census, with the fingerprint of what decides its results."""

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

# `content`, and so the fingerprint, leaves out the run's name and place, keys that only decide its speed, keys that
# only `memscan reduce` reads, and keys that ask for a check, which changes no result.
PLACE = ("name", "out")
RESOURCES = ("resources",)
REDUCE_ONLY = ("verdict", "clusters")
CHECKS = ("generator.sanity",)


class CensusConfig(Section):
    """This section describes a complete census."""

    name: str = Field(
        "census",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Reports show this name of the run. It may contain letters, digits, dots, dashes and underscores.",
    )
    out: str = Field("runs/census", description="The run is written to this folder, local or s3://.")
    prompts: PromptsConfig = Field(description="This section names the captions that are scanned.")
    generator: GeneratorConfig = Field(
        description="This section names the checkpoint under census and says how it is sampled."
    )
    segmenter: SegmenterConfig = Field(
        description="This section names the model that separates foreground from background."
    )
    embedder: EmbedderConfig = Field(
        description="This section names the copy-detection model that turns images into vectors."
    )
    index: IndexConfig = Field(description="This section names the reference images and their index.")
    metric: MetricConfig = Field(
        MetricConfig(),
        description="This section says how a generation is compared with a reference image, and which score counts as "
        "a copy.",
    )
    screen: ScreenConfig | None = Field(
        None,
        description="This section describes the screen that decides which prompts are scanned in full. If it is not "
        "given, every prompt is scanned in full.",
    )
    signals: SignalsConfig = Field(
        SignalsConfig(),
        description="This section says which detector signals a scan computes in addition to the noise norms.",
    )
    verdict: VerdictConfig = Field(
        VerdictConfig(), description="This section says how labels of generations make a prompt's verdict."
    )
    clusters: ClustersConfig = Field(ClustersConfig(), description="This section says how flagged prompts are grouped.")
    resources: ResourcesConfig = Field(
        ResourcesConfig(), description="This section says which resources of the machines a run may use."
    )
    part_size: int = Field(
        10_000,
        ge=1,
        description="A part has this number of prompts. A run commits one part at a time.",
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
            raise ValueError(
                "screen.first_samples needs actors that both sample and classify: leave out resources.judges"
            )
        return self

    def content(self) -> dict[str, Any]:
        """Return everything that decides the results, as JSON.

        Name and place, the resources, and the keys that only `memscan reduce` reads are left out. A census without a
        screen, with memscan's own sampling loop, or with the default signals has the same content as before these
        choices existed. The scheduler of a stock pipeline is part of the generator's identity instead.
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
        """Return a hash of `content`, as 16 hexadecimal digits."""
        content = self.content()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
