"""This module configures the screen, which decides which prompts are scanned in full, and the detector signals."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memscan.config.base import Section
from memscan.config.models import EmbedderConfig


class ScreenConfig(Section):
    """This section describes the screen. One denoiser call per seed decides whether a prompt is scanned in full.

    An audit estimates what the screen missed. A threshold is valid for one model, detector, timestep and number of
    seeds; `memscan evaluate screen RUN` chooses one.
    """

    threshold: float = Field(
        description="A prompt whose detector score is equal to this threshold or above it is scanned in full. The "
        "threshold is in the detector's own unit."
    )
    threshold_source: str = Field(
        "configured", description="This text says where the threshold comes from; the report prints it."
    )
    detector: Literal[
        "noise_norm", "seed_similarity", "attention_entropy_first", "one_step_dcs", "anisotropy", "sharpness"
    ] = Field(
        "noise_norm", description="The score of this detector decides. docs/detection.md describes each detector."
    )
    timestep: float | None = Field(
        None,
        ge=0,
        lt=1000,
        description="The model is given this timestep, in [0, 1000). If it is not given, it is the first timestep of "
        "the sampling, and prompts that are scanned reuse the step that the screen has made.",
    )
    seeds: int = Field(
        4, ge=1, description="Each prompt is screened with this number of seeds. All prompts share the same seeds."
    )
    audit_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="This share of the prompts below the threshold, in (0, 1], is scanned in full too, to estimate "
        "what the screen misses.",
    )
    audit_seed: int = Field(
        0, ge=0, description="This is the seed of the draw of the audit. Another seed draws other prompts."
    )
    first_samples: int | None = Field(
        None,
        ge=1,
        description="Every scanned prompt first gets this number of images. The rest of generator.samples are made "
        "only if one of them is memorised. If it is not given, all images are made at once.",
    )


class SignalsConfig(Section):
    """This section chooses detector signals beside the noise norms. They cost no denoiser call (docs/detection.md)."""

    attention: bool = Field(
        True,
        description="This key says whether attention entropy and bright ending are computed from the last ten steps. "
        "Only memscan's own sampling loop has them.",
    )
    semantic: EmbedderConfig | None = Field(
        None,
        description="This is an image encoder for semantic similarity, such as CLIP. The signal is its cosine between "
        "a generation and its match. Its keys are those of `embedder`. If it is not given, this signal is not "
        "computed.",
    )
