"""This module holds the work of the workers of the locality analyses on the scanned model.

    memorised images    -> an embedding from every start, what it draws, is it the image?       shared out by images
    those that are      -> activations, the units of NeMo's search, the weights of Wanda's      shared out, in rounds

There is a checkpoint after the attacks and after every round.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memscan.config import CensusConfig
from memscan.mitigation.settings import LocalitySettings
from pipelines.mitigate.finetune_data import open_references
from pipelines.mitigate.search import Bench, SearchJob
from pipelines.ray.training import STATE, TrainingWorkers, read_state, resumed
from pipelines.verify.workers import label_against

ROUND = 16  # embeddings between two checkpoints, over all workers
TOGETHER = 3  # searches in one batch of the denoiser, as a verification has them
TENSORS = "located.safetensors"


@dataclass(frozen=True)
class LocalityJob:
    """This is the description of the job that the workers get.

    Args:
        census: of the run, for the copy classifier.
        search: model, settings and ordinary captions of NeMo's search; its targets are those whose image is attacked.
        index, version: as in `FinetuneJob`.
    """

    census: CensusConfig
    search: SearchJob
    settings: LocalitySettings
    index: str
    version: int | None


def locality_loop(config: dict[str, Any]) -> None:
    """Attack, then localise what was found.

    The last checkpoint holds "labels" by image and start, "units" by IMAGE.START and the layout in its state, and
    tensors: "start/KEY", "found/KEY", "activations/KEY", "weights/KEY/PARAMETER" (flat positions).
    """
    from safetensors.torch import save_file

    job: LocalityJob = config["job"]
    workers = TrainingWorkers.join()
    bench = LocalityBench(job)
    bench.search.calibrate(workers)
    state, tensors = resumed(read_located) or ({}, {})

    def report() -> None:
        def write(folder: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / TENSORS))
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

        workers.report({"located": len(state["units"])}, write)

    if not state:
        attacked = workers.shared(len(job.search.targets), bench.attack)
        state |= {"labels": [labels for labels, _ in attacked], "units": {}, "threshold": bench.search.threshold.value}
        state["layout"] = [list(bench.search.layout.names), list(bench.search.layout.sizes)]
        tensors |= {name: tensor for _, found in attacked for name, tensor in found.items()}
        report()
    keys = sorted(name.partition("/")[2] for name in tensors if name.startswith("found/"))
    todo = [key for key in keys if key not in state["units"]]
    for at in range(0, len(todo), ROUND):
        batch = todo[at : at + ROUND]
        located = workers.shared(len(batch), partial(_localise_one, bench, tensors, batch))
        for key, (units, more) in zip(batch, located, strict=True):
            state["units"][key] = units
            tensors |= {name.format(key): tensor for name, tensor in more.items()}
        report()
    if not todo:
        report()


def read_located(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return state and tensors of a checkpoint."""
    from safetensors.torch import load_file

    return read_state(folder), load_file(str(folder / TENSORS))


def _localise_one(
    bench: LocalityBench, tensors: dict[str, Any], batch: list[str], at: int
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    return bench.localise(tensors[f"found/{batch[at]}"])


class LocalityBench:
    """This is the scanned model with NeMo's search and the census's own copy classifier."""

    def __init__(self, job: LocalityJob) -> None:
        from memscan.metric.variants import load_metric
        from memscan.worker.encoder import RegionEncoder

        self.job = job
        self.search = Bench(job.search)
        self.generator = self.search.generator
        self.encoder = RegionEncoder(job.census, job.search.device, job.search.threads)
        self.metric = load_metric(job.census.metric, job.search.device)
        self.references = open_references(job.index, job.version)
        self._empty: dict[tuple[str, int], Any] | None = None

    def attack(self, at: int) -> tuple[list[str], dict[str, Any]]:
        """Attack one image, and return labels of the images of the found embeddings, by starting point.

        Tensors by "start/KEY" hold where every search began. If a search brings the image back, "found/KEY" holds what
        it found.
        """
        import torch

        from memscan.mitigation.attack import AttackSettings, attack_many
        from memscan.mitigation.utility import encode_images
        from memscan.models.text import Text

        settings, target = self.job.settings, self.job.search.targets[at]
        reference = self.references.fetch(self.references.row_of(target.match_ids[0]))
        latents = encode_images(self.generator.checkpoint.vae, [reference.image_HWC])
        begin, seeds = self._starts(at)
        limits = AttackSettings(settings.attack_steps, settings.attack_batch, settings.attack_rate)
        parts = []
        for first in range(0, len(begin), TOGETHER):
            some = begin[first : first + TOGETHER]
            images = latents.expand(len(some), -1, -1, -1)
            parts.append(
                attack_many(self.search.denoiser, images, torch.stack(some), seeds[first : first + TOGETHER], limits)
            )
        found = torch.cat(parts)
        text = Text(found.to(self.generator.encode([""]).dtype))
        drawn = self.generator.generate_from(text, [seed + 1 for seed in seeds]).images_BHWC
        labels = [label_against(self.metric, self.encoder, image, reference) for image in drawn]
        tensors = {f"start/{at:04d}.{number:04d}": one.cpu() for number, one in enumerate(begin)}
        for number, label in enumerate(labels):
            if label != "NM":
                tensors[f"found/{at:04d}.{number:04d}"] = found[number].cpu()
        return labels, tensors

    def _starts(self, at: int) -> tuple[list[Any], list[int]]:
        from memscan.mitigation.attack import start_embedding
        from memscan.records import sample_seed

        settings, ordinary = self.job.settings, self.job.search.ordinary
        own_TD = self.generator.encode([self.job.search.targets[at].caption])[0].float()
        seeds = [sample_seed(f"locality/{at}/{number}", 0, settings.seed) for number in range(settings.starts)]
        begin = []
        for number, seed in enumerate(seeds):
            unrelated = ordinary[(at * settings.starts + number) % len(ordinary)]
            unrelated_TD = self.generator.encode([unrelated])[0].float()
            begin.append(start_embedding(start_of(number), own_TD, unrelated_TD, seed))
        return begin, seeds

    def localise(self, text_TD: Any) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """Return what NeMo and Wanda choose for one embedding.

        Units are JSON; tensors are by name, where {} stands for the key.
        """
        from memscan.mitigation import wanda
        from memscan.mitigation.activations import value_activations
        from memscan.mitigation.locality import positions

        unet, device = self.search.unet, self.search.denoiser.device
        text_TD = text_TD.to(device)
        if self._empty is None:
            self._empty = self._norms(self.generator.encode([""])[0])
        chosen = wanda.selection(unet, [self._norms(text_TD)], [self._empty], self.job.settings.wanda_share)
        tensors = {f"weights/{{}}/{name}": one.cpu() for name, one in positions(chosen).items()}
        tensors["activations/{}"] = value_activations(unet, self.search.layout, text_TD[None])[0].cpu()
        return self.search.find(text_TD)["units"], tensors

    def _norms(self, text_TD: Any) -> dict[tuple[str, int], Any]:
        """Inputs of Wanda's layers while a text is drawn from the score's seeds."""
        from memscan.mitigation import wanda
        from memscan.models.text import Text

        settings = self.job.settings
        halved = self.generator.config.guidance > 1 and settings.wanda_rows == "caption"
        norms = wanda.InputNorms(self.search.unet, halved=halved)
        text = Text(text_TD[None].to(self.generator.encode([""]).dtype))
        for first in range(0, settings.seeds, self.generator.batch_size):
            seeds = list(range(first, min(first + self.generator.batch_size, settings.seeds)))
            with norms.recording(settings.wanda_steps):
                self.generator.generate_from(text[[0] * len(seeds)], seeds)
        return norms.squares


def start_of(number: int) -> Any:
    """Return the kind of an image's search: its own prompt first, then noise and other prompts in turn."""
    return "prompt" if number == 0 else ("noise", "unrelated")[(number - 1) % 2]
