"""Which prompts are scanned in full, and which detector signals a scan takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memscan.config.base import Section
from memscan.config.models import EmbedderConfig


class ScreenConfig(Section):
    """Which prompts are scanned in full: one denoiser call per seed decides, and an audit says what that missed.

    A threshold holds for one model, detector, timestep and number of seeds; `memscan evaluate screen RUN` chooses one.
    """

    threshold: float = Field(
        description="The score of the detector from which on a prompt is scanned in full, in the detector's own unit."
    )
    threshold_source: str = Field(
        "configured", description="Where the threshold comes from, in words; the report prints it."
    )
    detector: Literal[
        "noise_norm", "seed_similarity", "attention_entropy_first", "one_step_dcs", "anisotropy", "sharpness"
    ] = Field("noise_norm", description="The detector whose score decides; docs/detection.md describes each of them.")
    timestep: float | None = Field(
        None,
        ge=0,
        lt=1000,
        description="The timestep that the model is told, in [0, 1000). When it is not given, it is the first one of "
        "the sampling, and prompts that are scanned take up the step that the screen has made.",
    )
    seeds: int = Field(
        4, ge=1, description="The number of seeds that each prompt is screened with; all prompts share them."
    )
    audit_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="The share of the prompts below the threshold, in (0, 1], that are scanned in full all the same, "
        "to estimate what the screen misses.",
    )
    audit_seed: int = Field(0, ge=0, description="The seed of the draw of the audit; another seed draws other prompts.")
    first_samples: int | None = Field(
        None,
        ge=1,
        description="The number of images that every scanned prompt gets first; the rest of generator.samples are made "
        "only where one of these is memorised. When it is not given, all are made at once.",
    )


class SignalsConfig(Section):
    """Detector signals that a scan takes beside the noise norms; they cost no denoiser call (docs/detection.md)."""

    attention: bool = Field(
        True,
        description="Whether attention entropy and bright ending are taken, from the last ten steps; only memscan's "
        "own sampling loop has them.",
    )
    semantic: EmbedderConfig | None = Field(
        None,
        description="An image encoder for meaning, such as CLIP, whose cosine between a generation and its match is "
        "taken; its keys are those of `embedder`. When it is not given, that signal is not taken.",
    )
