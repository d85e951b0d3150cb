"""This module holds the settings of a mitigation, which are checked, written into its card and hashed into its name."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["nemo", "nemo_c", "wanda", "finetune", "dedup"]
# The settings of the attack that several commands share.
ATTACK_STEPS = "Each search makes this number of steps; the default is the published number."
ATTACK_BATCH = "Each step of a search draws this number of pairs of noise and timestep; the default is published."
ATTACK_RATE = "This is the learning rate of Adam in a search; the default is published."


class Settings(BaseModel):
    """These are settings that do not change after they are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
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
    blocks: tuple[Literal["down_blocks", "mid_block", "up_blocks"], ...] = Field(
        ("down_blocks", "mid_block"),
        description="NeMo considers the value units of the cross-attention in these parts of the UNet. The default is "
        "the published choice.",
    )
    convention: Literal["first", "second"] = Field(
        "second",
        description="The score is computed at this timestep: the first, as in the paper, or the second, as in its "
        "code.",
    )
    steps: int = Field(
        50, ge=1, description="The timestep of the score comes from a schedule with this number of steps."
    )
    seeds: int = Field(
        10,
        ge=2,
        description="The score compares this number of initial latents with each other. In the locality analysis, "
        "Wanda generates from the same ones.",
    )
    rank: Literal["activation", "excess"] = Field(
        "activation",
        description='The search takes the k units of each layer that are highest by this measure: "activation" is the '
        'activation for the prompt, as published, and "excess" is the part of it above the mean over ordinary '
        "captions.",
    )
    extend: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The number k of units per layer may grow until this share of all units, in [0, 1], is considered; "
        "with 0 the search ends as published.",
    )
    ordinary: int = Field(
        2000, ge=2, description="The activation statistics use at most this number of ordinary captions."
    )
    threshold_prompts: int = Field(
        60, ge=1, description="The threshold of the score uses at most this number of ordinary prompts."
    )
    # Wanda
    wanda_share: float = Field(
        0.01, gt=0, le=1, description="Wanda considers this share of the weights of each row, in (0, 1]."
    )
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

    method: Method = Field(
        description="This is how the model is repaired. The option `--method` gives it, and `--set` cannot change it."
    )
    scope: Literal["prompt", "cluster", "all"] = Field(
        "all",
        description="The units found for these prompts are off together: for one prompt, for the prompts of one "
        "cluster, or for all flagged prompts. The option `--scope` gives it too. Without either, `nemo` uses prompt, "
        "`nemo_c` uses cluster, and every other method uses all.",
    )
    # NeMo-C
    paraphrases: int = Field(
        0,
        ge=0,
        description="The search is repeated for this number of paraphrases of each prompt, which templates make. "
        "Unless it is given, `nemo_c` uses 1.",
    )
    embeddings: int = Field(
        0,
        ge=0,
        description="The search is repeated for this number of copies of each prompt's embedding, to which noise is "
        "added. Unless it is given, `nemo_c` uses 1.",
    )
    embedding_noise: float = Field(
        0.1, ge=0, description="That noise has this standard deviation, as a multiple of that of the embedding."
    )
    prune: bool = Field(
        False,
        description="If this is true, a unit of a union is switched on again where this brings no memorisation back.",
    )
    # fine-tuning
    pruned: str | None = Field(
        None,
        description="The repaired model in this folder generates the surrogate images. The option `--pruned` gives it "
        "too; `finetune` needs it.",
    )
    epochs: int = Field(
        24,
        ge=1,
        description="The fine-tuning has this number of epochs. The published adversarial training has 5.",
    )
    steps_per_epoch: int = Field(40, ge=1, description="Each epoch has this number of steps of the optimiser.")
    batch: int = Field(
        16,
        ge=1,
        description="Each step uses this number of pairs of image and caption, over all workers together, and as many "
        "adversarial pairs. It must be a multiple of the number of workers.",
    )
    micro_batch: int = Field(
        16,
        ge=1,
        description="One worker processes this number of pairs at once; it adds up gradients until its share of the "
        "batch is done.",
    )
    rate: float = Field(
        1e-5,
        gt=0,
        description="This is the highest learning rate of AdamW. The rate rises to it over 10 steps, and then falls to "
        "0 by half a cosine.",
    )
    weight: float = Field(
        1.0, ge=0, description="The adversarial term of the loss has this weight; the ordinary term has 1."
    )
    ema: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="The result is an exponential moving average of the weights. This is its decay per step.",
    )
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
    attack_batch: int = Field(8, ge=1, description=ATTACK_BATCH)
    attack_rate: float = Field(0.1, gt=0, description=ATTACK_RATE)
    seed: int = Field(
        0,
        ge=0,
        description="The order of the training images, the batches, the attacks and the surrogates are drawn from this "
        "seed.",
    )


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
    attack_steps: int = Field(50, ge=1, description=ATTACK_STEPS)
    attack_batch: int = Field(8, ge=1, description=ATTACK_BATCH)
    attack_rate: float = Field(0.1, gt=0, description=ATTACK_RATE)
    draws: int = Field(
        2, ge=1, description="This number of images is generated from each embedding that an attack found."
    )
    strata: int = Field(
        8,
        ge=1,
        description="The alignment of image and caption is computed at this number of timesteps, spread over the "
        "schedule.",
    )
    pictures: int = Field(12, ge=0, description="This number of flagged prompts is shown before and after.")
    seed: int = Field(
        0,
        ge=0,
        description="The attacks and the generations from what they find are drawn from this seed. It also chooses the "
        "unrelated prompt from which an attack starts.",
    )


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
    attack_steps: int = Field(50, ge=1, description=ATTACK_STEPS)
    attack_batch: int = Field(8, ge=1, description=ATTACK_BATCH)
    attack_rate: float = Field(0.1, gt=0, description=ATTACK_RATE)
    seed: int = Field(
        0, ge=0, description="The searches and the generations from what they find are drawn from this seed."
    )

    def search(self) -> MitigationSettings:
        """Return the same search as a mitigation's."""
        shared = {name: getattr(self, name) for name in SearchSettings.model_fields}
        return MitigationSettings(method="nemo", scope="prompt", **shared)
