"""What a fine-tuning looks at: ordinary pairs, surrogate images, and the attack on the model as it is now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.targets import Target
from pipelines.engine.team import Team
from pipelines.run_folder.inputs import check_generator

CHUNK = 32
ATTACK_CHUNK = 4  # searches in one batch of the denoiser, eight rows each
SURROGATE_SAMPLES = 4


@dataclass(frozen=True)
class FinetuneJob:
    """What the workers are told.

    Args:
        census: of the run, for models, sampling rule and referee.
        index: folder of the run's reference index, and `version` the one that judged the run.
        ordinary: captions that no one has flagged, as unrelated starts.
        switches: a switch file of the pruned model, "" where its checkpoint is changed for good.
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


class Material:
    """Everything that training looks at; made once by each worker."""

    def __init__(self, job: FinetuneJob, team: Team) -> None:
        from memscan.mitigation.denoiser import Denoiser
        from memscan.models.generator import Generator

        self.job, self.team = job, team
        check_generator(job.census.generator, job.model)
        self.generator = Generator.load(job.census.generator, job.device, taps=())
        parts = self.generator.checkpoint
        self.denoiser = Denoiser.of(parts.unet, parts.scheduler_config, where=parts.where)
        self.empty_TD = self.generator.encode([""])[0].float().cpu()
        self.references = open_references(job.index, job.version)
        self.pairs = self._pairs()
        self.refused = 0
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
        return Pairs(torch.cat(self.team.shared(len(starts), latents)), text_MTD, torch.arange(len(chosen)), text_P)

    def _targets(self) -> None:
        """Latents of the memorised images, embeddings of the prompts and surrogate images."""
        import torch

        from memscan.mitigation.utility import encode_images

        targets = self.job.targets
        rows = [self.references.row_of(target.match_ids[0]) for target in targets]
        vae = self.generator.checkpoint.vae
        self.images_NCHW = encode_images(vae, [self.references.fetch(row).image_HWC for row in rows])
        self.prompts_NTD = torch.cat([self.generator.encode([target.caption]) for target in targets]).float().cpu()
        self.unrelated_NTD = self.generator.encode(list(self.job.ordinary[: max(1, len(targets))])).float().cpu()
        surrogates, self.refused = self._surrogates()
        self.surrogates_NCHW = encode_images(vae, surrogates)

    def _surrogates(self) -> tuple[list[Any], int]:
        """One image a target that is no copy, and how many targets got an unrelated one for want of any."""
        from pipelines.scanning.prompt import Prompt
        from pipelines.scanning.stages import Plan, open_referee
        from pipelines.scanning.work import Generated, Sampler

        job = self.job
        samples = SURROGATE_SAMPLES
        generator = job.census.generator.model_copy(
            update={
                "path": job.pruned,
                "switches": job.switches or None,
                "samples": samples,
                "base_seed": 1 + job.settings.seed,
            }
        )
        census = job.census.model_copy(update={"generator": generator})
        sampler = Sampler(census, job.device, job.threads)
        referee = open_referee(Plan(census, job.device, job.threads, job.index, job.version), sampler.describer)

        def one(at: int) -> Any:
            target = job.targets[at]
            for caption in (target.caption, job.ordinary[at % len(job.ordinary)]):
                drawn = sampler([Prompt(target.prompt_id, caption)])
                judged = referee(drawn)
                if not isinstance(drawn[0], list) or not isinstance(judged[0], list):
                    raise MemscanError(f"cannot draw a surrogate ({drawn[0]})", where=target.prompt_id)
                clean: list[Generated] = [
                    g for g, record in zip(drawn[0], judged[0], strict=True) if record["label"] == "NM"
                ]
                if clean:
                    return clean[0].image_HWC, caption != target.caption
            raise MemscanError(
                "every surrogate image is a copy", where=target.caption, hint="prune more strongly first"
            )

        found = self.team.shared(len(job.targets), one)
        return [image for image, _ in found], sum(other for _, other in found)

    def adversarial(self, model: Any, epoch: int) -> Any:
        """The epoch's attack on the model as it is now, and the pairs that come of it."""
        import torch

        from memscan.mitigation.attack import STARTS, AttackSettings, attack_many, start_embedding
        from memscan.mitigation.finetune import adversarial_pairs

        settings, count = self.job.settings, len(self.job.targets)
        attack = AttackSettings(settings.attack_steps, settings.attack_batch, settings.attack_rate)
        model.eval()
        plain = replace(self.denoiser, unet=model)
        starts = range(0, count, ATTACK_CHUNK)

        def search(at: int) -> Any:
            members = range(starts[at], min(starts[at] + ATTACK_CHUNK, count))
            seeds = [settings.seed * 1_000_003 + epoch * 10_007 + number for number in members]
            begin = [
                start_embedding(
                    STARTS[(number + epoch) % len(STARTS)],
                    self.prompts_NTD[number],
                    self.unrelated_NTD[(number + epoch) % len(self.unrelated_NTD)],
                    seed,
                )
                for number, seed in zip(members, seeds, strict=True)
            ]
            return attack_many(plain, self.images_NCHW[list(members)], torch.stack(begin), seeds, attack).cpu()

        found = torch.cat(self.team.shared(len(starts), search))
        model.train()
        return adversarial_pairs(
            self.surrogates_NCHW, {at: found[at : at + 1] for at in range(count)}, self.prompts_NTD
        )


def training_rows(references: Any, job: FinetuneJob) -> list[tuple[int, str]]:
    """Rows and captions to train on, each image once.

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
    """The reference images of a version of an index, all shards as one."""
    from memscan.index.manifest import Manifest
    from memscan.index.references import ReferenceStore
    from memscan.mitigation.references import TrainingImages

    files = Manifest.load(index, version).reference_files(index)
    return TrainingImages([ReferenceStore(file, cached_groups=1024) for file in files])
