"""This module holds the work of the workers of a search.

They compute statistics and threshold, then process one prompt after another, shared out in rounds.

    ordinary captions   -> activation statistics and the score's threshold     shared out, joined in a fixed order
    flagged prompts     -> units of each (and of its augmented samples)        shared out in rounds, checkpoint after
    clusters            -> what of a union can be given back                   the same, where it is asked for
    flagged and empty   -> inputs of the feed-forward layers (Wanda)           shared out by chunks

Chunks and rounds do not depend on the number of workers, and sums are always taken in the same order. Therefore the
outcome does not depend on the number of workers either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from memscan.config import GeneratorConfig
from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.targets import Target
from pipelines.ray.training import TrainingWorkers, read_state, resumed
from pipelines.run_folder.inputs import check_generator

if TYPE_CHECKING:
    from memscan.models.generator import Generator

CHUNK = 64  # captions of one encoder call
ROUND = 16  # searches between two checkpoints, over all workers


@dataclass(frozen=True)
class SearchJob:
    """This is the description of the job that the workers get.

    Args:
        model: id of the checkpoint that was scanned; a worker loads no other one. "": not checked.
    """

    generator: GeneratorConfig
    settings: MitigationSettings
    targets: tuple[Target, ...]
    ordinary: tuple[str, ...]
    device: str
    threads: int
    model: str = ""

    def load(self) -> Generator:
        """Return the checkpoint that was scanned. Raises MemscanError if another one is in its place now."""
        from memscan.models.generator import Generator

        if self.model:
            check_generator(self.generator, self.model)
        return Generator.load(self.generator, self.device, hooks=())


class Bench:
    """This is a loaded model with NeMo's score, its statistics and its threshold."""

    def __init__(self, job: SearchJob) -> None:
        import torch

        from memscan.mitigation.score import NoiseScore
        from memscan.mitigation.units import Layout
        from memscan.models.denoiser import Denoiser

        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        self.job, settings = job, job.settings
        self.generator = job.load()
        parts = self.generator.checkpoint
        self.unet = parts.unet
        self.layout = Layout.of(self.unet, settings.blocks)
        self.denoiser = Denoiser.of(self.unet, parts.scheduler_config, where=parts.where)
        scale = parts.vae_scale
        shape = (self.unet.config.in_channels, self.generator.height // scale, self.generator.width // scale)
        self.score = NoiseScore(
            self.denoiser,
            self.layout,
            shape,
            parts.scheduler_config,
            steps=settings.steps,
            seeds=range(settings.seeds),
            convention=settings.convention,
        )

    def calibrate(self, workers: TrainingWorkers) -> None:
        """Compute statistics and threshold from ordinary captions."""
        from memscan.mitigation.activations import ActivationStatistics, Moments, value_activations
        from memscan.mitigation.score import Threshold

        captions = self.job.ordinary[: self.job.settings.ordinary]
        starts = range(0, len(captions), CHUNK)

        def moments(at: int) -> Moments:
            text = self.generator.encode(captions[starts[at] : starts[at] + CHUNK])
            return Moments.of(value_activations(self.unet, self.layout, text).cpu())

        self.statistics = ActivationStatistics.join(workers.shared(len(starts), moments))
        few = captions[: self.job.settings.threshold_prompts]

        def pairs(at: int) -> Any:
            return self.score.pairwise(self.score.deltas(self.generator.encode([few[at]])[0]))

        self.threshold = Threshold.of(workers.shared(len(few), pairs))

    def samples(self, target: Target) -> list[Any]:
        """Return embeddings of a prompt: of itself, of its paraphrases, and of itself with noise."""
        from memscan.mitigation.augment import noisy_embeddings, paraphrases

        settings = self.job.settings
        captions = [target.caption, *paraphrases(target.caption, settings.paraphrases)]
        texts = [self.generator.encode([caption])[0] for caption in captions]
        seed = int(target.prompt_id[:12], 16)
        texts += list(noisy_embeddings(texts[0], settings.embeddings, settings.embedding_noise, seed))
        return texts

    def find(self, text_TD: Any) -> dict[str, Any]:
        """Return the outcome of NeMo for one embedding, as JSON."""
        from memscan.mitigation.nemo import THETA_END, NemoSettings, search

        chosen = self.job.settings
        settings = NemoSettings(theta_end=THETA_END[chosen.search_end], rank=chosen.rank, extend=chosen.extend)
        found = search(text_TD, self.score, self.statistics, self.threshold.value, settings)
        return {**asdict(found), "units": found.units.to_json()}


def nemo_loop(config: dict[str, Any]) -> None:
    """Search for every sample of every target; the last checkpoint holds all outcomes."""
    job: SearchJob = config["job"]
    workers = TrainingWorkers.join()
    bench = Bench(job)
    bench.calibrate(workers)
    state: dict[str, Any] = resumed(read_state) or {"found": {}, "unions": {}}
    state["threshold"] = asdict(bench.threshold)
    state["units"], state["statistics"] = bench.layout.count, bench.statistics.count
    per_target = 1 + job.settings.paraphrases + job.settings.embeddings
    items = [(target, number) for target in job.targets for number in range(per_target)]
    todo = [item for item in items if _key(*item) not in state["found"]]
    for start in range(0, len(todo), ROUND):
        batch = todo[start : start + ROUND]
        outcomes = workers.shared(len(batch), partial(_search_one, bench, batch))
        state["found"].update(zip((_key(*item) for item in batch), outcomes, strict=True))
        workers.report_state({"searches": len(state["found"]), "of": len(items)}, state)
    if job.settings.prune:
        _prune(bench, workers, state)
    workers.report_state({"searches": len(state["found"]), "of": len(items)}, state)


def _key(target: Target, number: int) -> str:
    return f"{target.prompt_id}/{number}"


def _search_one(bench: Bench, batch: Sequence[tuple[Target, int]], at: int) -> dict[str, Any]:
    target, number = batch[at]
    return bench.find(bench.samples(target)[number])


def found_units(state: dict[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """Return the units of each prompt, those of its augmented samples included."""
    from memscan.mitigation.units import UnitSet, union

    sets: dict[str, list[UnitSet]] = {target.prompt_id: [] for target in targets}
    for key, outcome in state["found"].items():
        sets[key.partition("/")[0]].append(UnitSet.from_json(outcome["units"]))
    return {prompt: union(parts) for prompt, parts in sets.items()}


def _prune(bench: Bench, workers: TrainingWorkers, state: dict[str, Any]) -> None:
    """Give back what a group's union does not need, in rounds as the searches."""
    from memscan.mitigation.union import scoped

    job = bench.job
    clusters = {target.prompt_id: target.cluster for target in job.targets}
    groups = scoped(found_units(state, job.targets), clusters, job.settings.scope)
    todo = [item for item in groups.items() if item[0] not in state["unions"]]
    for start in range(0, len(todo), ROUND):
        batch = todo[start : start + ROUND]
        pruned = workers.shared(len(batch), partial(_prune_one, bench, clusters, batch))
        state["unions"].update(zip((name for name, _ in batch), pruned, strict=True))
        workers.report_state({"unions": len(state["unions"]), "of": len(groups)}, state)


def _prune_one(
    bench: Bench, clusters: dict[str, str], batch: Sequence[tuple[str, Any]], at: int
) -> dict[str, list[int]]:
    from memscan.mitigation.nemo import BlockedScore
    from memscan.mitigation.union import group_of, prune

    name, units = batch[at]
    job, threshold = bench.job, bench.threshold.value
    members = [one for one in job.targets if group_of(one.prompt_id, clusters, job.settings.scope) == name]
    made = (BlockedScore.of(bench.score, bench.samples(target)[0], threshold) for target in members)
    scores = [blocked for blocked in made if blocked is not None]
    limits = [max(threshold, blocked(units)) for blocked in scores]
    return prune(units, bench.layout, scores, limits).to_json()


def wanda_loop(config: dict[str, Any]) -> None:
    """Collect layer inputs over flagged and empty prompts, and prune; the checkpoint holds the pruned weights."""
    from safetensors.torch import save_file

    from memscan.mitigation import wanda
    from memscan.records import sample_seed

    job: SearchJob = config["job"]
    workers = TrainingWorkers.join()
    bench_threads(job)
    generator = job.load()
    unet, size = generator.checkpoint.unet, job.generator.batch_size
    starts = range(0, len(job.targets), size)

    def collect(at: int) -> list[Any]:
        chosen = job.targets[starts[at] : starts[at] + size]
        seeds = [sample_seed(target.prompt_id, 0, job.generator.base_seed) for target in chosen]
        found = []
        for captions in ([target.caption for target in chosen], [""] * len(chosen)):
            norms = wanda.InputNorms(unet, halved=job.generator.guidance > 1 and job.settings.wanda_rows == "caption")
            with norms.recording(job.settings.wanda_steps):
                generator.generate(captions, seeds)
            found.append(norms.squares)
        return found

    parts = workers.shared(len(starts), collect)
    chosen = wanda.selection(unet, [part[0] for part in parts], [part[1] for part in parts], job.settings.wanda_share)
    pruned = {name: tensor.cpu().contiguous() for name, tensor in wanda.prune(unet, chosen).items()}
    workers.report({"tensors": len(pruned)}, lambda folder: save_file(pruned, str(folder / "changed.safetensors")))


def bench_threads(job: SearchJob) -> None:
    """Return the number of numeric threads of this worker."""
    import torch

    if job.device == "cpu":
        torch.set_num_threads(job.threads)
