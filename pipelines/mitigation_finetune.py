"""What the workers of a fine-tuning do.

    references          -> latents and captions to train on                        encoded once, shared out by chunks
    flagged prompts     -> a surrogate image each, drawn by the pruned model,       shared out; those that are copies
                           and looked at by the census's own referee                themselves are refused
    per epoch: attack   -> embeddings that bring each memorised image back          shared out
               training -> data-parallel over equal slices of one global batch      every rank the same steps
               checkpoint: weights, average, optimiser, place

Killed workers go back to the last epoch; noise, batches and starts derive from seed and epoch, so it goes as before.
Where the loss is not finite every rank stops at the same step and says so, and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.targets import Target
from pipelines.team import STATE, Team, resumed

CHUNK = 32
ATTACK_CHUNK = 4  # searches in one batch of the denoiser, eight rows each
SURROGATE_SAMPLES = 4
WEIGHTS, AVERAGE, OPTIMISER = "unet.safetensors", "average.safetensors", "optimiser.safetensors"


@dataclass(frozen=True)
class FinetuneJob:
    """What the workers are told.

    Args:
        census: of the run, for models, sampling rule and referee.
        index: folder of the run's reference index, and `version` the one that judged the run.
        ordinary: captions that no one has flagged, as unrelated starts.
        switches: a switch file of the pruned model, "" where its checkpoint is changed for good.
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


@dataclass
class Tuner:
    """The model in training, its average, its optimiser and its place."""

    model: Any
    denoiser: Any
    average: Any
    optimiser: Any
    epoch: int = 0
    losses: list[float] | None = None


def finetune_loop(config: dict[str, Any]) -> None:
    """Train; the last checkpoint holds the averaged weights."""
    import torch

    job: FinetuneJob = config["job"]
    team = Team.join()
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    material = Material(job, team)
    tuner = _tuner(job, material)
    adversarial = job.settings.method == "finetune"
    while tuner.epoch < job.settings.epochs:
        extra = material.adversarial(tuner) if adversarial else None
        loss = _epoch(job, team, tuner, material, extra)
        if loss is None:
            team.report(
                {"failed": f"the loss is not finite in epoch {tuner.epoch + 1}: lower the learning rate"}, _nothing
            )
            return
        tuner.epoch += 1
        assert tuner.losses is not None
        tuner.losses.append(loss)
        metrics = {"epoch": tuner.epoch, "loss": loss, "refused": material.refused}
        team.report(metrics, lambda folder: _save(folder, tuner, material.refused))
    if tuner.epoch == 0 or not team.size:
        raise MemscanError("nothing was trained")


def _nothing(folder: Path) -> None:
    (folder / STATE).write_text("{}", encoding="utf-8")


class Material:
    """Everything that training looks at; made once by each worker."""

    def __init__(self, job: FinetuneJob, team: Team) -> None:
        from memscan.mitigation.denoiser import Denoiser
        from memscan.models.generator import Generator

        self.job, self.team = job, team
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
        from pipelines.screen import Prompt
        from pipelines.stages import Plan, open_referee
        from pipelines.work import Generated, Sampler

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

    def adversarial(self, tuner: Tuner) -> Any:
        """The epoch's attack on the model as it is now, and the pairs that come of it."""
        import torch

        from memscan.mitigation.attack import STARTS, AttackSettings, attack_many, start_embedding
        from memscan.mitigation.finetune import adversarial_pairs

        settings, count = self.job.settings, len(self.job.targets)
        attack = AttackSettings(settings.attack_steps, settings.attack_batch, settings.attack_rate)
        tuner.model.eval()
        starts = range(0, count, ATTACK_CHUNK)

        def search(at: int) -> Any:
            members = range(starts[at], min(starts[at] + ATTACK_CHUNK, count))
            seeds = [settings.seed * 1_000_003 + tuner.epoch * 10_007 + number for number in members]
            begin = [
                start_embedding(
                    STARTS[(number + tuner.epoch) % len(STARTS)],
                    self.prompts_NTD[number],
                    self.unrelated_NTD[(number + tuner.epoch) % len(self.unrelated_NTD)],
                    seed,
                )
                for number, seed in zip(members, seeds, strict=True)
            ]
            plain = tuner.denoiser.__class__(_inner(tuner.model), tuner.denoiser.alpha_bars, tuner.denoiser.prediction)
            return attack_many(plain, self.images_NCHW[list(members)], torch.stack(begin), seeds, attack).cpu()

        found = torch.cat(self.team.shared(len(starts), search))
        tuner.model.train()
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
    import hashlib

    matched = {match for target in job.targets for match in target.match_ids}
    flagged = {target.caption for target in job.targets}
    adversarial = job.settings.method == "finetune"
    seen: set[bytes] = set()
    chosen: list[tuple[int, str]] = []
    order = np.random.default_rng(job.settings.seed).permutation(len(references)).tolist()
    for row in order:
        if len(chosen) == job.settings.pairs:
            break
        stored = references.encoded(row)
        content = (
            stored["image"] or str(stored["path"]).encode()
        )  # an index may name its images instead of holding them
        digest = hashlib.sha256(content).digest()
        if not stored["caption"] or digest in seen:
            continue
        seen.add(digest)
        if not adversarial or (stored["reference_id"] not in matched and stored["caption"] not in flagged):
            chosen.append((row, stored["caption"]))
    if not chosen:
        raise MemscanError("no reference image with a caption to train on", where=job.index)
    return chosen


def open_references(index: str, version: int | None) -> Any:
    """The reference images of a version of an index, all shards as one."""
    from memscan.index.manifest import Manifest
    from memscan.index.references import ReferenceStore, ShardedReferences

    files = Manifest.load(index, version).reference_files(index)
    return ShardedReferences([ReferenceStore(file, cached_groups=1024) for file in files])


def _tuner(job: FinetuneJob, material: Material) -> Tuner:
    """A fresh start, or the last checkpoint."""
    import ray.train.torch
    import torch

    from memscan.mitigation.denoiser import Denoiser
    from memscan.mitigation.finetune import Average

    unet = material.generator.checkpoint.unet.float().requires_grad_(True).train()
    average = Average(unet, job.settings.ema)
    state = resumed(lambda folder: _load(folder, unet, average))
    model = ray.train.torch.prepare_model(unet)
    denoiser = Denoiser(model, material.denoiser.alpha_bars, material.denoiser.prediction)
    optimiser = torch.optim.AdamW(model.parameters(), lr=job.settings.rate, weight_decay=0.01)
    if state is None:
        return Tuner(model, denoiser, average, optimiser, 0, [])
    optimiser.load_state_dict(_unflatten(state["optimiser"], optimiser.state_dict()))
    average.steps = state["average_steps"]
    return Tuner(model, denoiser, average, optimiser, state["epoch"], state["losses"])


def _epoch(job: FinetuneJob, team: Team, tuner: Tuner, material: Material, extra: Any) -> float | None:
    """One epoch's steps; its mean loss, or None where the loss was not finite."""
    import torch

    from memscan.mitigation.finetune import Term, learning_rate, slices, step_loss

    settings = _finetune_settings(job.settings)
    rows = slices(settings, team.rank, team.size)
    streams = _streams(material, extra, settings, tuner)
    half = torch.autocast("cuda", dtype=torch.bfloat16) if job.device == "cuda" else nullcontext()
    total = 0.0
    for step in range(settings.steps_per_epoch):
        drawn = [(pairs, next(stream), weight, empty) for pairs, stream, weight, empty in streams]
        for group in tuner.optimiser.param_groups:
            group["lr"] = learning_rate(settings, tuner.epoch * settings.steps_per_epoch + step)
        tuner.optimiser.zero_grad()
        mean = torch.zeros((), device=material.denoiser.device)
        for at, part in enumerate(rows):
            terms = [Term(pairs, draw.part(part), weight, empty) for pairs, draw, weight, empty in drawn]
            with _unsynchronised(tuner.model, at < len(rows) - 1):
                with half:
                    loss = step_loss(tuner.denoiser, terms) / len(rows)
                loss.backward()
            mean += loss.detach()
        if not np.isfinite(value := _mean_over(team, mean)):
            return None
        torch.nn.utils.clip_grad_norm_(tuner.model.parameters(), settings.clip)
        tuner.optimiser.step()
        tuner.average.update(_inner(tuner.model))
        total += value / settings.steps_per_epoch
    return total


def _streams(
    material: Material, extra: Any, settings: Any, tuner: Tuner
) -> list[tuple[Any, Iterator[Any], float, Any]]:
    from memscan.mitigation.finetune import draws

    timesteps = material.denoiser.timesteps
    ordinary = draws(material.pairs, settings, timesteps, tuner.epoch, 0)
    streams: list[tuple[Any, Iterator[Any], float, Any]] = [(material.pairs, ordinary, 1.0, material.empty_TD)]
    if extra is not None:
        streams.append((extra, draws(extra, settings, timesteps, tuner.epoch, 1), settings.weight, None))
    return streams


def _finetune_settings(settings: MitigationSettings) -> Any:
    from dataclasses import fields

    from memscan.mitigation.finetune import FinetuneSettings

    known = {field.name for field in fields(FinetuneSettings)}
    return FinetuneSettings(**{key: value for key, value in settings.model_dump().items() if key in known})


def _mean_over(team: Team, value: Any) -> float:
    import torch.distributed as dist

    if team.size > 1:
        dist.all_reduce(value)
    return float(value) / team.size


def _unsynchronised(model: Any, wanted: bool) -> Any:
    return model.no_sync() if wanted and hasattr(model, "no_sync") else nullcontext()


def _inner(model: Any) -> Any:
    return getattr(model, "module", model)


def _save(folder: Path, tuner: Tuner, refused: int) -> None:
    from safetensors.torch import save_file

    weights = {name: value.detach().cpu().contiguous() for name, value in _inner(tuner.model).state_dict().items()}
    save_file(weights, str(folder / WEIGHTS))
    save_file({name: value.cpu().contiguous() for name, value in tuner.average.values.items()}, str(folder / AVERAGE))
    save_file(_flatten(tuner.optimiser.state_dict()), str(folder / OPTIMISER))
    state = {
        "epoch": tuner.epoch,
        "losses": tuner.losses,
        "average_steps": tuner.average.steps,
        "refused": refused,
    }
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def _load(folder: Path, unet: Any, average: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    unet.load_state_dict(load_file(str(folder / WEIGHTS)))
    average.values = {k: v.to(average.values[k].device) for k, v in load_file(str(folder / AVERAGE)).items()}
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return {**state, "optimiser": load_file(str(folder / OPTIMISER))}


def _flatten(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state as tensors by name: safetensors holds nothing else, and pickle is not read back."""
    return {
        f"{at}.{key}": value.cpu().contiguous() for at, entry in state["state"].items() for key, value in entry.items()
    }


def _unflatten(tensors: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        at, _, key = name.partition(".")
        state.setdefault(int(at), {})[key] = value
    return {"state": state, "param_groups": like["param_groups"]}


def averaged(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The averaged weights by parameter name, and the state, of a job's last checkpoint."""
    from safetensors.torch import load_file

    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return load_file(str(checkpoint / AVERAGE)), state
