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

    added: ClassVar[tuple[str, ...]] = ("search_end", "wanda_rows")

    # NeMo
    search_end: Literal["paper", "code"] = Field(
        "paper",
        description="The search for units ends here: at a theta of 1 with 16 units per layer, as in the paper, or one "
        "round before, at 1.25 with 15, as in the authors' code.",
    )
    blocks: tuple[Literal["down_blocks", "mid_block", "up_blocks"], ...] = ("down_blocks", "mid_block")
    convention: Literal["first", "second"] = Field(
        "second",
        description="The score is computed at this timestep: the first, as in the paper, or the second, as in its "
        "code.",
    )
    steps: int = Field(
        50, ge=1, description="The timestep of the score comes from a schedule with this number of steps."
    )
    seeds: int = Field(10, ge=2)
    rank: Literal["activation", "excess"] = "activation"
    extend: float = Field(
        0.0, ge=0, le=1, description="k may grow to this share of the units; with 0 the search ends as published."
    )
    ordinary: int = Field(
        2000, ge=2, description="The activation statistics use at most this number of ordinary captions."
    )
    threshold_prompts: int = Field(
        60, ge=1, description="The threshold of the score uses at most this number of ordinary prompts."
    )
    # Wanda
    wanda_share: float = Field(0.01, gt=0, le=1, description="Wanda considers this share of the weights of each row.")
    wanda_steps: int = Field(10, ge=1, description="Wanda considers this number of first timesteps.")
    wanda_rows: Literal["caption", "both"] = Field(
        "caption",
        description="The inputs of these rows of a guided batch count: those with the caption, or both halves, as "
        "in the authors' code.",
    )


class MitigationSettings(SearchSettings):
    """These are the settings of `memscan mitigate`.

    Defaults are the published values if there are any, except for the attack inside the fine-tuning
    (docs/mitigation.md).
    """

    method: Method
    scope: Literal["prompt", "cluster", "all"] = Field(
        "all",
        description="These units are off together: those of one prompt (NeMo), of its cluster (NeMo-C), or of all "
        "prompts.",
    )
    # NeMo-C
    paraphrases: int = Field(0, ge=0, description="Each prompt gets this number of additional samples by template.")
    embeddings: int = Field(
        0, ge=0, description="Each prompt gets this number of additional samples with noise on its embedding."
    )
    embedding_noise: float = Field(
        0.1, ge=0, description="The noise has this standard deviation, as a share of that of the embedding."
    )
    prune: bool = Field(
        False,
        description="If this is true, units of a union are switched on again where this brings no memorisation back.",
    )
    # fine-tuning
    pruned: str | None = Field(
        None, description="The model of the mitigation in this folder generates the surrogate images."
    )
    epochs: int = Field(24, ge=1)
    steps_per_epoch: int = Field(40, ge=1)
    batch: int = Field(16, ge=1)
    micro_batch: int = Field(16, ge=1)
    rate: float = Field(1e-5, gt=0)
    weight: float = Field(1.0, ge=0)
    ema: float = Field(0.99, ge=0, lt=1)
    early: float = Field(
        2.0, ge=1, description="This is the emphasis on noisy timesteps in the adversarial term; 1 means no emphasis."
    )
    pairs: int = Field(4000, ge=1, description="The training uses at most this number of pairs.")
    surrogates: int = Field(4, ge=1, description="Each flagged prompt has at most this number of surrogate images.")
    searches: int = Field(
        2, ge=1, description="This number of attacks on the image of each flagged prompt runs at the same time."
    )
    search_epochs: int = Field(
        5, ge=1, description="An attack continues for this number of epochs before it begins again."
    )
    attack_steps: int = Field(10, ge=1, description="Each search makes this number of steps per epoch.")
    attack_batch: int = Field(8, ge=1)
    attack_rate: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)


class VerifySettings(Settings):
    """These are the settings of `memscan verify`."""

    paraphrases: int = Field(
        1,
        ge=0,
        le=4,
        description="Each flagged prompt has this number of paraphrases, by the last four of its templates.",
    )
    panel: int = Field(
        60,
        ge=2,
        description="The panel has at most this number of ordinary prompts, from the half that no repair has seen.",
    )
    references: int = Field(512, ge=2, description="The Fréchet distance uses at most this number of training images.")
    targets: int = Field(
        12,
        ge=1,
        description="The images of at most this number of flagged prompts are attacked, one per cluster first.",
    )
    attack_steps: int = Field(50, ge=1)
    attack_batch: int = Field(8, ge=1)
    attack_rate: float = Field(0.1, gt=0)
    draws: int = Field(
        2, ge=1, description="This number of images is generated from each embedding that an attack found."
    )
    strata: int = Field(8, ge=1, description="The alignment uses this number of timesteps.")
    pictures: int = Field(12, ge=0, description="This number of flagged prompts is shown before and after.")
    seed: int = Field(0, ge=0)


class LocalitySettings(SearchSettings):
    """These are the settings of `memscan evaluate locality`."""

    images: int = Field(
        8, ge=2, description="At most this number of memorised images is attacked, one per cluster first."
    )
    starts: int = Field(
        6,
        ge=2,
        description="Each image has this number of searches: from its prompt, then from noise and other prompts.",
    )
    attack_steps: int = Field(50, ge=1)
    attack_batch: int = Field(8, ge=1)
    attack_rate: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)

    def search(self) -> MitigationSettings:
        """Return the same search as a mitigation's."""
        shared = {name: getattr(self, name) for name in SearchSettings.model_fields}
        return MitigationSettings(method="nemo", scope="prompt", **shared)
