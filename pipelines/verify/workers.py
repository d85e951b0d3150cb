"""This module holds the work of a verification's workers on one model: they generate, attack and encode.

    ordinary panel      -> images, features, alignment with their captions        shared out by prompts
    training images     -> features                                              shared out by chunks
    flagged prompts     -> one picture each, under the census's own seed         shared out by prompts
    memorised images    -> embeddings that bring them back, what those draw      shared out by images, in rounds
    unmemorised images  -> the same, with as many steps                          (the control)

The model is the original or a repair of it; captions, seeds, starts and the model that measures are the same for both.
There is a checkpoint after the panel and after every round of attacks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memscan.config import CensusConfig, GeneratorConfig
from memscan.mitigation.settings import VerifySettings
from memscan.mitigation.targets import Target
from pipelines.mitigate.finetune_data import open_references
from pipelines.ray.training import TrainingWorkers, resumed

CHUNK = 16
ROUND = 8  # attacked images between two checkpoints, over all workers
EXAMINED = "examined.safetensors"
OUTCOMES = "outcomes.json"


@dataclass(frozen=True)
class VerifyJob:
    """This is the description of the job that the workers get.

    Args:
        census: of the run, with the model under examination as its generator.
        original: the model before any repair, whose denoiser measures alignment for every model alike.
        targets: whose images are attacked; each with the training image that it reproduces most often first.
        pictured: flagged prompts to be drawn, (prompt id, caption).
        panel: ordinary prompts, (prompt id, caption); their captions are the unrelated starts as well.
        controls: (row, caption) of training images that are not known to be memorised, one per target.
        references: rows of training images for the Fréchet distance.
        index, version: as in `FinetuneJob`.
    """

    census: CensusConfig
    original: GeneratorConfig
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
class Aim:
    """This is one image under attack, with its row, its caption, and the target whose units are off.

    Args:
        kind: "memorised" or "control".
        image: its number among those of its kind.
    """

    kind: str
    image: int
    row: int
    caption: str
    prompt_id: str


def verify_loop(config: dict[str, Any]) -> None:
    """Examine a model; the last checkpoint holds features, pictures and the outcomes of the attacks."""
    from safetensors.numpy import save_file

    job: VerifyJob = config["job"]
    workers = TrainingWorkers.join()
    bench = VerifyBench(job)
    tensors, outcomes = resumed(_read) or (None, {"attacks": [], "encoder": bench.encoder.embedder.spec.id})

    def report() -> None:
        def write(folder: Path) -> None:
            assert tensors is not None  # the look below comes before any report
            save_file(tensors, str(folder / EXAMINED))
            (folder / OUTCOMES).write_text(json.dumps(outcomes), encoding="utf-8")

        workers.report({"attacks": len(outcomes["attacks"])}, write)

    if tensors is None:
        tensors = bench.look(workers)
        report()
    aims = bench.aims()
    done = {(one["kind"], one["image"]) for one in outcomes["attacks"]}
    todo = [aim for aim in aims if (aim.kind, aim.image) not in done]
    for start in range(0, len(todo), ROUND):
        outcomes["attacks"] += bench.attacks(workers, todo[start : start + ROUND])
        report()
    if not todo:
        report()


def _read(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    from safetensors.numpy import load_file

    return load_file(str(folder / EXAMINED)), json.loads((folder / OUTCOMES).read_text(encoding="utf-8"))


class VerifyBench:
    """This is the model with its copy classifier; each worker loads it once."""

    def __init__(self, job: VerifyJob) -> None:
        import torch

        from memscan.metric.variants import load_metric
        from memscan.models.denoiser import Denoiser
        from memscan.models.generator import Generator
        from memscan.worker.generation import GenerationWorker

        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        self.job = job
        sampler = GenerationWorker(job.census, job.device, job.threads)
        self.generator, self.encoder = sampler.own, sampler.encoder
        parts = self.generator.checkpoint
        self.denoiser = Denoiser.of(parts.unet, parts.scheduler_config, where=parts.where)
        self.original = Generator.load(job.original, job.device, hooks=())
        own = self.original.checkpoint
        self.judging = Denoiser.of(own.unet, own.scheduler_config, where=own.where)
        self.metric = load_metric(job.census.metric, job.device)
        self.references = open_references(job.index, job.version)

    def look(self, workers: TrainingWorkers) -> dict[str, Any]:
        """Return what is generated and encoded without an attack, as arrays by name.

        `panel_off_PSD` and `alignment_off_PS` are there where the repair is one of switches: the panel with the units
        of one group off, as if the gate took ordinary prompts for flagged ones, the groups in turn.
        """
        panel = workers.shared(len(self.job.panel), self._panel)
        starts = range(0, len(self.job.references), CHUNK)
        training = workers.shared(len(starts), lambda at: self._features(self.job.references[starts[at] :][:CHUNK]))
        pictures = workers.shared(len(self.job.pictured), lambda at: self._draw(*self.job.pictured[at], 1)[0])
        width = self.encoder.embedder.dimension
        tensors = {
            **_stacked(panel, ""),
            "training_ND": np.concatenate([*training, np.zeros((0, width))]).astype(np.float32),
            "pictures_KHWC": np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8),
        }
        if groups := self._groups():
            off = workers.shared(len(self.job.panel), lambda at: self._panel_off(at, groups[at % len(groups)]))
            tensors |= _stacked(off, "_off")
        return tensors

    def attacks(self, workers: TrainingWorkers, aims: Sequence[Aim]) -> list[dict[str, Any]]:
        """Return the outcomes of every starting point of every image, in order."""
        return [one for found in workers.shared(len(aims), lambda at: self._attack(aims[at])) for one in found]

    def _draw(self, prompt_id: str, caption: str, samples: int) -> Any:
        from memscan.records import sample_seed

        seeds = [sample_seed(prompt_id, sample, self.generator.config.base_seed) for sample in range(samples)]
        return self.generator.generate([caption] * samples, seeds).images_BHWC

    def _panel(self, at: int) -> tuple[Any, Any]:
        """Features (S, D) and alignment (S,) of one ordinary prompt's generations."""
        from memscan.mitigation.utility import alignment, encode_images

        prompt_id, caption = self.job.panel[at]
        images = self._draw(prompt_id, caption, self.generator.config.samples)
        latents = encode_images(self.original.checkpoint.vae, list(images))
        text = self.original.encode([caption]).float()
        empty = self.original.encode([""]).float()[0]
        aligned = alignment(
            self.judging, latents, text.expand(len(images), -1, -1), empty, strata=self.job.settings.strata
        )
        return self.encoder.embedder.embed(list(images)), aligned.numpy()

    def _features(self, rows: Sequence[int]) -> Any:
        """Features of training images, those that cannot be read left out; the caller counts what came."""
        from memscan.errors import RowReject

        found = []
        for row in rows:
            try:
                found.append(self.references.fetch(row).image_HWC)
            except RowReject:
                continue
        return self.encoder.embedder.embed(found) if found else np.zeros((0, self.encoder.embedder.dimension))

    def aims(self) -> list[Aim]:
        """Return memorised images, then as many that are not known to be memorised."""
        targets = self.job.targets
        memorised = [
            Aim("memorised", at, self.references.row_of(one.match_ids[0]), one.caption, one.prompt_id)
            for at, one in enumerate(targets)
        ]
        controls = [
            Aim("control", at, row, caption, targets[at].prompt_id)
            for at, (row, caption) in enumerate(self.job.controls)
        ]
        return memorised + controls

    def _attack(self, aim: Aim) -> list[dict[str, Any]]:
        """All starts on one image, on the model as it is drawn for the target, and what the found embeddings draw."""
        import torch

        from memscan.mitigation.attack import STARTS, AttackSettings, attack_many, start_embedding
        from memscan.mitigation.utility import encode_images
        from memscan.models.text import Text
        from memscan.records import sample_seed

        settings, job = self.job.settings, self.job
        reference = self.references.fetch(aim.row)
        latents = encode_images(self.generator.checkpoint.vae, [reference.image_HWC])
        unrelated = job.panel[(aim.image + settings.seed) % len(job.panel)][1]
        own_TD, unrelated_TD = self.generator.encode([aim.caption, unrelated]).float()
        # Seeds of their own names: no attack inside a training has drawn from them.
        seeds = [sample_seed(f"verify/{aim.kind}/{start}/{aim.image}", 0, settings.seed) for start in STARTS]
        begin = [start_embedding(start, own_TD, unrelated_TD, seed) for start, seed in zip(STARTS, seeds, strict=True)]
        limits = AttackSettings(settings.attack_steps, settings.attack_batch, settings.attack_rate)
        with self._off(aim.prompt_id):
            found = attack_many(
                self.denoiser, latents.expand(len(STARTS), -1, -1, -1), torch.stack(begin), seeds, limits
            )
            text = Text(found.to(self.generator.encode([""]).dtype))
            rows = [at for at in range(len(STARTS)) for _ in range(settings.draws)]
            draws = [seed + 1 + draw for seed in seeds for draw in range(settings.draws)]
            drawn = self.generator.generate_from(text[rows], draws).images_BHWC
        labels = [label_against(self.metric, self.encoder, image, reference) for image in drawn]
        vectors = self.encoder.embedder.embed([reference.image_HWC, *drawn])
        likeness = [float(value) for value in vectors[1:] @ vectors[0]]
        parts = [slice(at * settings.draws, (at + 1) * settings.draws) for at in range(len(STARTS))]
        return [
            {"kind": aim.kind, "image": aim.image, "start": start, "labels": labels[part], "similarity": likeness[part]}
            for start, part in zip(STARTS, parts, strict=True)
        ]

    def _groups(self) -> list[str]:
        """Groups with units to switch off; none if the repair is not one of switches."""
        from memscan.mitigation.switches import GuardedGenerator

        if not isinstance(self.generator, GuardedGenerator):
            return []
        return sorted(name for name, units in self.generator.groups.items() if len(units))

    def _panel_off(self, at: int, group: str) -> tuple[Any, Any]:
        from memscan.mitigation.units import switched_off

        guarded: Any = self.generator
        with switched_off(guarded.checkpoint.unet, guarded.layout, guarded.groups[group]):
            return self._panel(at)

    def _off(self, prompt_id: str) -> AbstractContextManager[None]:
        """Return the units that are off while a prompt is generated, if the repair consists of switches."""
        from memscan.mitigation.switches import GuardedGenerator, group_for
        from memscan.mitigation.units import switched_off

        guarded = self.generator
        group = group_for(guarded.prompts, prompt_id) if isinstance(guarded, GuardedGenerator) else None
        if not isinstance(guarded, GuardedGenerator) or group is None:
            return nullcontext()
        return switched_off(guarded.checkpoint.unet, guarded.layout, guarded.groups[group])


def label_against(metric: Any, encoder: Any, image_HWC: Any, reference: Any) -> str:
    """Return FB-Mem's class of an image against one training image."""
    masks = encoder.masks([image_HWC, reference.image_HWC])
    other = masks[1] if reference.mask_HW is None else reference.mask_HW
    prepared = metric.prepare(image_HWC, masks[0])
    (scores,) = metric.score(prepared, [metric.prepare(reference.image_HWC, other)])
    return str(metric.classify(scores).value)


def _stacked(panel: Sequence[tuple[Any, Any]], suffix: str) -> dict[str, Any]:
    return {
        f"panel{suffix}_PSD": np.stack([features for features, _ in panel]).astype(np.float32),
        f"alignment{suffix}_PS": np.stack([alignment for _, alignment in panel]).astype(np.float32),
    }
