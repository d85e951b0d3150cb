"""This module makes the data of a fine-tuning: ordinary pairs, surrogate images, attacks on the current model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.targets import Target
from pipelines.ray.training import TrainingWorkers
from pipelines.run_folder.inputs import check_generator

CHUNK = 32
ATTACK_CHUNK = 8  # searches in one batch of the denoiser, `attack_batch` rows each
UNRELATED = 512  # ordinary prompts that searches begin from, at most


@dataclass(frozen=True)
class FinetuneJob:
    """This is the description of the job that the workers get.

    Args:
        census: of the run, for models, sampling rule and classifier.
        index: folder of the run's reference index, and `version` the one that judged the run.
        ordinary: captions that no one has flagged, as unrelated starts.
        switches: a switch file of the pruned model, "" if its checkpoint is changed for good.
        model: id of the checkpoint that was scanned; a worker loads no other one.
    """

    census: CensusConfig
    settings: MitigationSettings
    targets: tuple[Target, ...]
    ordinary: tuple[str, ...]
    index: str
    version: int | None
    pruned: str
    switches: str
    device: str
    threads: int
    model: str


class FinetuneData:
    """This is all data of the training; each worker makes it once."""

    def __init__(self, job: FinetuneJob, workers: TrainingWorkers) -> None:
        from memscan.models.denoiser import Denoiser
        from memscan.models.generator import Generator

        self.job, self.workers = job, workers
        check_generator(job.census.generator, job.model)
        self.generator = Generator.load(job.census.generator, job.device, hooks=())
        parts = self.generator.checkpoint
        self.denoiser = Denoiser.of(parts.unet, parts.scheduler_config, where=parts.where)
        self.empty_TD = self.generator.encode([""])[0].float().cpu()
        self.references = open_references(job.index, job.version)
        self.pairs = self._pairs()
        self.ways: dict[str, int] = {}
        self.pool: Any = None
        if job.settings.method == "finetune":
            self._targets()

    def _pairs(self) -> Any:
        import torch

        from memscan.mitigation.finetune import Pairs
        from memscan.mitigation.utility import encode_images

        chosen = training_rows(self.references, self.job)
        vae = self.generator.checkpoint.vae
        starts = range(0, len(chosen), CHUNK)

        def latents(at: int) -> Any:
            rows = [row for row, _ in chosen[starts[at] : starts[at] + CHUNK]]
            return encode_images(vae, [self.references.fetch(row).image_HWC for row in rows])

        captions = list(dict.fromkeys(caption for _, caption in chosen))
        text_MTD = torch.cat(
            [self.generator.encode(captions[at : at + 64]).float().cpu() for at in range(0, len(captions), 64)]
        )
        number = {caption: at for at, caption in enumerate(captions)}
        text_P = torch.tensor([number[caption] for _, caption in chosen])
        return Pairs(torch.cat(self.workers.shared(len(starts), latents)), text_MTD, torch.arange(len(chosen)), text_P)

    def _targets(self) -> None:
        """Latents of the memorised images, embeddings of the prompts, surrogate images and the searches' pool."""
        import torch

        from memscan.mitigation.adversary import Pool
        from memscan.mitigation.utility import encode_images
        from pipelines.mitigate.surrogates import Surrogates, counted

        targets, settings = self.job.targets, self.job.settings
        rows = [self.references.row_of(target.match_ids[0]) for target in targets]
        vae = self.generator.checkpoint.vae
        self.images_NCHW = encode_images(vae, [self.references.fetch(row).image_HWC for row in rows])
        self.prompts_NTD = torch.cat([self.generator.encode([target.caption]) for target in targets]).float().cpu()
        self.unrelated_MTD = self.generator.encode(list(self.job.ordinary[:UNRELATED])).float().cpu()
        drawing = Surrogates(self.job)
        found = self.workers.shared(len(targets), lambda at: drawing.of(targets[at]))
        self.surrogates_SCHW = encode_images(vae, [image for images, _ in found for image in images])
        self.owners = [at for at, (images, _) in enumerate(found) for _ in images]
        self.ways = counted([way for _, ways in found for way in ways])
        self.pool = Pool.empty(len(targets) * settings.searches, *self.prompts_NTD.shape[1:])

    def adversarial(self, model: Any, epoch: int) -> Any:
        """Run the epoch's attack on the current model, and return the pairs that result."""
        import torch

        from memscan.mitigation.adversary import schedule
        from memscan.mitigation.attack import AttackSettings, attack_many
        from memscan.mitigation.finetune import owned_pairs

        settings, count = self.job.settings, len(self.job.targets)
        attack = AttackSettings(settings.attack_steps, settings.attack_batch, settings.attack_rate)
        searches = schedule(
            count, settings.searches, settings.search_epochs, epoch, settings.seed, len(self.unrelated_MTD)
        )
        pool = self.pool.begin(searches, self.prompts_NTD, self.unrelated_MTD, epoch)
        model.eval()
        plain = replace(self.denoiser, unet=model)
        starts = range(0, len(searches), ATTACK_CHUNK)

        def search(at: int) -> Any:
            rows = slice(starts[at], starts[at] + ATTACK_CHUNK)
            images = self.images_NCHW[[one.target for one in searches[rows]]]
            return attack_many(plain, images, pool.now_PTD[rows], [one.seed for one in searches[rows]], attack).cpu()

        self.pool = pool.moved(torch.cat(self.workers.shared(len(starts), search)))
        model.train()
        texts, owners = self.pool.texts(searches)
        return owned_pairs(
            self.surrogates_SCHW, self.owners, torch.cat([texts, self.prompts_NTD]), [*owners, *range(count)]
        )


def training_rows(references: Any, job: FinetuneJob) -> list[tuple[int, str]]:
    """Return rows and captions to train on, each image once.

    For adversarial fine-tuning, pairs whose image a flagged prompt reproduces, or whose caption is flagged, are left
    out.

    Raises:
        MemscanError: no reference has a caption.
    """
    from memscan.mitigation.pairs import distinct_pairs

    adversarial = job.settings.method == "finetune"
    chosen = distinct_pairs(
        np.random.default_rng(job.settings.seed).permutation(len(references)).tolist(),
        references.encoded,
        job.settings.pairs,
        without_ids={match for target in job.targets for match in target.match_ids} if adversarial else (),
        without_captions={target.caption for target in job.targets} if adversarial else (),
    )
    if not chosen:
        raise MemscanError("no reference image with a caption to train on", where=job.index)
    return chosen


def open_references(index: str, version: int | None) -> Any:
    """Return the reference images of a version of an index, with all shards as one."""
    from memscan.index.manifest import Manifest
    from memscan.index.references import ReferenceStore
    from memscan.mitigation.references import TrainingImages

    files = Manifest.load(index, version).reference_files(index)
    return TrainingImages([ReferenceStore(file, cached_groups=1024) for file in files])
