"""What the workers of a verification do to one model: draw, attack, describe.

    ordinary panel      -> images, features, alignment with their captions        shared out by prompts
    training images     -> features                                              shared out by chunks
    memorised images    -> embeddings that bring them back, what those draw      shared out by attacks
    unmemorised images  -> the same, with as many steps                          (the control)
    flagged prompts     -> one picture each, under the census's own seed         shared out by prompts

The model is the original or a repair of it; captions, seeds, starts and judge are the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memscan.config import CensusConfig, GeneratorConfig
from memscan.mitigation.settings import VerifySettings
from memscan.mitigation.targets import Target
from pipelines.mitigation_material import open_references
from pipelines.team import Team

CHUNK = 16
EXAMINED = "examined.safetensors"
OUTCOMES = "outcomes.json"


@dataclass(frozen=True)
class VerifyJob:
    """What the workers are told.

    Args:
        census: of the run, with the model under examination as its generator.
        judge: the original model, whose denoiser measures alignment for every model alike.
        targets: whose images are attacked; each with the training image that it reproduces most often first.
        pictured: flagged prompts to be drawn, (prompt id, caption).
        panel: ordinary prompts, (prompt id, caption); their captions are the unrelated starts as well.
        controls: (row, caption) of training images that are not known to be memorised, one a target.
        references: rows of training images for the Fréchet distance.
        index, version: as in `FinetuneJob`.
    """

    census: CensusConfig
    judge: GeneratorConfig
    settings: VerifySettings
    targets: tuple[Target, ...]
    pictured: tuple[tuple[str, str], ...]
    panel: tuple[tuple[str, str], ...]
    controls: tuple[tuple[int, str], ...]
    references: tuple[int, ...]
    index: str
    version: int | None
    device: str
    threads: int


@dataclass(frozen=True)
class Search:
    """One attack: on which image, from where, with which target's units off."""

    kind: str
    image: int
    row: int
    caption: str
    start: str
    prompt_id: str


def verify_loop(config: dict[str, Any]) -> None:
    """Examine a model; the checkpoint holds features, pictures and the outcomes of the attacks."""
    from safetensors.numpy import save_file

    job: VerifyJob = config["job"]
    team = Team.join()
    bench = VerifyBench(job)
    tensors, outcomes = bench.examine(team)

    def write(folder: Path) -> None:
        import json

        save_file(tensors, str(folder / EXAMINED))
        (folder / OUTCOMES).write_text(json.dumps(outcomes), encoding="utf-8")

    team.report({"attacks": len(outcomes["attacks"])}, write)


class VerifyBench:
    """The model with what judges it, loaded once by each worker."""

    def __init__(self, job: VerifyJob) -> None:
        import torch

        from memscan.metric.variants import load_metric
        from memscan.mitigation.denoiser import Denoiser
        from memscan.models.generator import Generator
        from pipelines.work import Sampler

        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        self.job = job
        sampler = Sampler(job.census, job.device, job.threads)
        self.generator, self.describer = sampler.own, sampler.describer
        parts = self.generator.checkpoint
        self.denoiser = Denoiser.of(parts.unet, parts.scheduler_config, where=parts.where)
        self.judge = Generator.load(job.judge, job.device, taps=())
        own = self.judge.checkpoint
        self.judging = Denoiser.of(own.unet, own.scheduler_config, where=own.where)
        self.metric = load_metric(job.census.metric, job.device)
        self.references = open_references(job.index, job.version)

    def examine(self, team: Team) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays by name, and the rest as JSON."""
        panel = team.shared(len(self.job.panel), self._panel)
        starts = range(0, len(self.job.references), CHUNK)
        training = team.shared(len(starts), lambda at: self._features(self.job.references[starts[at] :][:CHUNK]))
        searches = list(self._searches())
        attacks = team.shared(len(searches), lambda at: self._attack(searches[at]))
        pictures = team.shared(len(self.job.pictured), lambda at: self._draw(*self.job.pictured[at], 1)[0])
        width = self.describer.embedder.dimension
        tensors = {
            "panel_PSD": np.stack([features for features, _ in panel]).astype(np.float32),
            "alignment_PS": np.stack([alignment for _, alignment in panel]).astype(np.float32),
            "training_ND": np.concatenate([*training, np.zeros((0, width))]).astype(np.float32),
            "pictures_KHWC": np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8),
        }
        return tensors, {"attacks": attacks, "encoder": self.describer.embedder.spec.id}

    def _draw(self, prompt_id: str, caption: str, samples: int) -> Any:
        from memscan.records import sample_seed

        seeds = [sample_seed(prompt_id, sample, self.generator.config.base_seed) for sample in range(samples)]
        return self.generator.generate([caption] * samples, seeds).images_BHWC

    def _panel(self, at: int) -> tuple[Any, Any]:
        """Features (S, D) and alignment (S,) of one ordinary prompt's generations."""
        from memscan.mitigation.utility import alignment, encode_images

        prompt_id, caption = self.job.panel[at]
        images = self._draw(prompt_id, caption, self.generator.config.samples)
        latents = encode_images(self.judge.checkpoint.vae, list(images))
        text = self.judge.encode([caption]).float()
        empty = self.judge.encode([""]).float()[0]
        aligned = alignment(
            self.judging, latents, text.expand(len(images), -1, -1), empty, strata=self.job.settings.strata
        )
        return self.describer.embedder.embed(list(images)), aligned.numpy()

    def _features(self, rows: Sequence[int]) -> Any:
        """Features of training images, those that cannot be read left out; the caller counts what came."""
        from memscan.errors import RowReject

        found = []
        for row in rows:
            try:
                found.append(self.references.fetch(row).image_HWC)
            except RowReject:
                continue
        return self.describer.embedder.embed(found) if found else np.zeros((0, self.describer.embedder.dimension))

    def _searches(self) -> Iterator[Search]:
        from memscan.mitigation.attack import STARTS

        for number, target in enumerate(self.job.targets):
            row = self.references.row_of(target.match_ids[0])
            for start in STARTS:
                yield Search("memorised", number, row, target.caption, start, target.prompt_id)
        for number, (row, caption) in enumerate(self.job.controls):
            for start in STARTS:
                yield Search("control", number, row, caption, start, self.job.targets[number].prompt_id)

    def _attack(self, search: Search) -> dict[str, Any]:
        """One search on the model as it is drawn for the search's target, and what the found embedding draws."""
        from memscan.mitigation.attack import AttackSettings, attack, start_embedding
        from memscan.mitigation.utility import encode_images
        from memscan.models.text import Text
        from memscan.records import sample_seed

        settings, job = self.job.settings, self.job
        reference = self.references.fetch(search.row)
        latents = encode_images(self.generator.checkpoint.vae, [reference.image_HWC])[0]
        own, unrelated = self.generator.encode(
            [search.caption, job.panel[(search.image + settings.seed) % len(job.panel)][1]]
        ).float()
        # A seed of its own name: no attack inside a training has drawn from it.
        seed = sample_seed(f"verify/{search.kind}/{search.start}/{search.image}", 0, settings.seed)
        begin = start_embedding(search.start, own, unrelated, seed)  # type: ignore[arg-type]
        limits = AttackSettings(settings.attack_steps, settings.attack_batch, settings.attack_rate)
        with self._off(search.prompt_id):
            found = attack(self.denoiser, latents, begin, seed, limits)
            text = Text(found[None].to(self.generator.encode([""]).dtype))
            seeds = [seed + 1 + draw for draw in range(settings.draws)]
            drawn = self.generator.generate_from(text[[0] * settings.draws], seeds).images_BHWC
        labels = [self._label(image, reference) for image in drawn]
        vectors = self.describer.embedder.embed([reference.image_HWC, *drawn])
        return {
            "kind": search.kind,
            "image": search.image,
            "start": search.start,
            "labels": labels,
            "similarity": [float(value) for value in vectors[1:] @ vectors[0]],
        }

    def _off(self, prompt_id: str) -> AbstractContextManager[None]:
        """The units that are off while a prompt is drawn, where the repair is one of switches."""
        from memscan.mitigation.guard import GuardedGenerator
        from memscan.mitigation.units import switched_off

        guarded = self.generator
        if not isinstance(guarded, GuardedGenerator) or prompt_id not in guarded.prompts:
            return nullcontext()
        units = guarded.groups[guarded.prompts[prompt_id]]
        return switched_off(guarded.checkpoint.unet, guarded.layout, units)

    def _label(self, image_HWC: Any, reference: Any) -> str:
        """FB-Mem's class of an image against the one training image that was attacked."""
        masks = self.describer.masks([image_HWC, reference.image_HWC])
        other = masks[1] if reference.mask_HW is None else reference.mask_HW
        prepared = self.metric.prepare(image_HWC, masks[0])
        (scores,) = self.metric.score(prepared, [self.metric.prepare(reference.image_HWC, other)])
        return str(self.metric.classify(scores).value)
