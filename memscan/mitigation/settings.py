"""This module holds the settings of a mitigation, which are checked, written into its card and hashed into its name."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["nemo", "nemo_c", "wanda", "finetune", "dedup"]


class Settings(BaseModel):
    """These are settings that do not change after they are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    added: ClassVar[tuple[str, ...]] = ()  # fields that came later than folders that exist

    def fingerprint(self, inputs: dict[str, Any]) -> str:
        """Return 16 hex digits that name the settings together with what they are applied to."""
        values = self.model_dump(mode="json")
        for name in self.added:  # what is as it always was keeps the name that it had
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        content = {"settings": values, **inputs}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class SearchSettings(Settings):
    """These settings say what NeMo and Wanda consider, and where they stop.

    Defaults are published values if there are any.
    """

    added: ClassVar[tuple[str, ...]] = ("search_end",)

    # NeMo
    search_end: Literal["paper", "code"] = Field(
        "paper",
        description="where the search for units ends: at a theta of 1 with 16 units per layer, or one round before, at "
        "1.25 with 15, as the authors' code does",
    )
    blocks: tuple[Literal["down_blocks", "mid_block", "up_blocks"], ...] = ("down_blocks", "mid_block")
    convention: Literal["first", "second"] = Field(
        "second", description="timestep of the score: the paper's, the code's"
    )
    steps: int = Field(50, ge=1, description="of the schedule that the score's timestep is taken from")
    seeds: int = Field(10, ge=2)
    rank: Literal["activation", "excess"] = "activation"
    extend: float = Field(0.0, ge=0, le=1, description="share of the units that k may grow to; 0 ends as published")
    ordinary: int = Field(2000, ge=2, description="ordinary captions for the activation statistics, at most")
    threshold_prompts: int = Field(60, ge=1, description="ordinary prompts for the score's threshold, at most")
    # Wanda
    wanda_share: float = Field(0.01, gt=0, le=1, description="of each row")
    wanda_steps: int = Field(10, ge=1, description="first timesteps looked at")


class MitigationSettings(SearchSettings):
    """These are the settings of `memscan mitigate`.

    Defaults are the published values if there are any, except for the attack inside the fine-tuning
    (docs/mitigation.md).
    """

    method: Method
    scope: Literal["prompt", "cluster", "all"] = Field(
        "all", description="whose units are off together: a prompt's (NeMo), its cluster's (NeMo-C), everybody's"
    )
    # NeMo-C
    paraphrases: int = Field(0, ge=0, description="additional samples of each prompt by template")
    embeddings: int = Field(0, ge=0, description="additional samples of each prompt with noise on its embedding")
    embedding_noise: float = Field(0.1, ge=0, description="standard deviation, as a share of the embedding's")
    prune: bool = Field(False, description="give back units of a union whose return brings nothing back")
    # fine-tuning
    pruned: str | None = Field(None, description="a mitigation's folder whose model draws the surrogate images")
    epochs: int = Field(24, ge=1)
    steps_per_epoch: int = Field(40, ge=1)
    batch: int = Field(16, ge=1)
    micro_batch: int = Field(16, ge=1)
    rate: float = Field(1e-5, gt=0)
    weight: float = Field(1.0, ge=0)
    ema: float = Field(0.99, ge=0, lt=1)
    early: float = Field(2.0, ge=1, description="emphasis of noisy timesteps in the adversarial term; 1 is none")
    pairs: int = Field(4000, ge=1, description="training pairs, at most")
    surrogates: int = Field(4, ge=1, description="surrogate images of each flagged prompt, at most")
    searches: int = Field(2, ge=1, description="attacks on each flagged prompt's image that are under way at once")
    search_epochs: int = Field(5, ge=1, description="epochs that an attack is carried on for before it begins anew")
    attack_steps: int = Field(10, ge=1, description="of each search in an epoch")
    attack_batch: int = Field(8, ge=1)
    attack_rate: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)


class VerifySettings(Settings):
    """These are the settings of `memscan verify`."""

    paraphrases: int = Field(1, ge=0, le=4, description="of each flagged prompt, by the last four of its templates")
    panel: int = Field(60, ge=2, description="ordinary prompts of the half that no repair has seen, at most")
    references: int = Field(512, ge=2, description="training images for the Fréchet distance, at most")
    targets: int = Field(12, ge=1, description="flagged prompts whose image is attacked, one a cluster first, at most")
    attack_steps: int = Field(50, ge=1)
    attack_batch: int = Field(8, ge=1)
    attack_rate: float = Field(0.1, gt=0)
    draws: int = Field(2, ge=1, description="images drawn from each embedding that an attack found")
    strata: int = Field(8, ge=1, description="timesteps of the alignment")
    pictures: int = Field(12, ge=0, description="flagged prompts shown before and after")
    seed: int = Field(0, ge=0)


class LocalitySettings(SearchSettings):
    """These are the settings of `memscan evaluate locality`."""

    images: int = Field(8, ge=2, description="memorised images, one a cluster first, at most")
    starts: int = Field(6, ge=2, description="searches an image: from its prompt, then from noise and other prompts")
    attack_steps: int = Field(50, ge=1)
    attack_batch: int = Field(8, ge=1)
    attack_rate: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)

    def search(self) -> MitigationSettings:
        """Return the same search as a mitigation's."""
        shared = {name: getattr(self, name) for name in SearchSettings.model_fields}
        return MitigationSettings(method="nemo", scope="prompt", **shared)
