"""This module holds the work of the workers of a fine-tuning.

    references          -> latents and captions to train on                        encoded once, shared out by chunks
    flagged prompts     -> a surrogate image each, drawn by the pruned model,       shared out; those that are copies
                           and looked at by the census's own classifier                themselves are refused
    per epoch: attack   -> embeddings that bring each memorised image back          shared out
               training -> data-parallel over equal slices of one global batch      every rank the same steps
               checkpoint: weights, average, optimiser, place

After workers were killed, the training continues from the last epoch. Noise, batches and starts derive from seed and
epoch, so the result is the same. If the loss is not finite, every rank stops at the same step and says so, and nothing
is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memscan.errors import MemscanError
from memscan.mitigation.settings import MitigationSettings
from pipelines.mitigate.finetune_data import FinetuneData, FinetuneJob
from pipelines.ray.training import STATE, TrainingWorkers, resumed

WEIGHTS, AVERAGE, OPTIMISER = "unet.safetensors", "average.safetensors", "optimiser.safetensors"
POOL = "searches.safetensors"


@dataclass
class Tuner:
    """This is the model in training, its average, its optimiser and its position."""

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
    workers = TrainingWorkers.join()
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    data = FinetuneData(job, workers)
    tuner = _tuner(job, data)
    adversarial = job.settings.method == "finetune"
    while tuner.epoch < job.settings.epochs:
        extra = data.adversarial(_inner(tuner.model), tuner.epoch) if adversarial else None
        loss = _epoch(job, workers, tuner, data, extra)
        if loss is None:
            workers.report(
                {"failed": f"the loss is not finite in epoch {tuner.epoch + 1}: lower the learning rate"}, _nothing
            )
            return
        tuner.epoch += 1
        assert tuner.losses is not None
        tuner.losses.append(loss)
        workers.report({"epoch": tuner.epoch, "loss": loss}, lambda folder: _save(folder, tuner, data))
    if tuner.epoch == 0 or not workers.size:
        raise MemscanError("nothing was trained")


def _nothing(folder: Path) -> None:
    (folder / STATE).write_text("{}", encoding="utf-8")


def _tuner(job: FinetuneJob, data: FinetuneData) -> Tuner:
    """Return a fresh start, or the last checkpoint."""
    import ray.train.torch
    import torch

    from memscan.mitigation.finetune import Average, nested_state
    from memscan.models.denoiser import Denoiser

    unet = data.generator.checkpoint.unet.float().requires_grad_(True).train()
    average = Average(unet, job.settings.ema)
    state = resumed(lambda folder: _load(folder, unet, average, data))
    model = ray.train.torch.prepare_model(unet)
    denoiser = Denoiser(model, data.denoiser.alpha_bars, data.denoiser.prediction)
    optimiser = torch.optim.AdamW(model.parameters(), lr=job.settings.rate, weight_decay=0.01)
    if state is None:
        return Tuner(model, denoiser, average, optimiser, 0, [])
    optimiser.load_state_dict(nested_state(state["optimiser"], optimiser.state_dict()))
    average.steps = state["average_steps"]
    return Tuner(model, denoiser, average, optimiser, state["epoch"], state["losses"])


def _epoch(job: FinetuneJob, workers: TrainingWorkers, tuner: Tuner, data: FinetuneData, extra: Any) -> float | None:
    """Train one epoch, and return its mean loss, or None if the loss was not finite."""
    import torch

    from memscan.mitigation.finetune import Term, learning_rate, slices, step_loss

    settings = _finetune_settings(job.settings)
    rows = slices(settings, workers.rank, workers.size)
    streams = _streams(data, extra, settings, tuner)
    half = torch.autocast("cuda", dtype=torch.bfloat16) if job.device == "cuda" else nullcontext()
    total = 0.0
    for step in range(settings.steps_per_epoch):
        drawn = [(pairs, next(stream), weight, empty) for pairs, stream, weight, empty in streams]
        for group in tuner.optimiser.param_groups:
            group["lr"] = learning_rate(settings, tuner.epoch * settings.steps_per_epoch + step)
        tuner.optimiser.zero_grad()
        mean = torch.zeros((), device=data.denoiser.device)
        for at, part in enumerate(rows):
            terms = [Term(pairs, draw.part(part), weight, empty) for pairs, draw, weight, empty in drawn]
            with _unsynchronised(tuner.model, at < len(rows) - 1):
                with half:
                    loss = step_loss(tuner.denoiser, terms) / len(rows)
                loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.detach()
        if not np.isfinite(value := _mean_over(workers, mean)):
            return None
        torch.nn.utils.clip_grad_norm_(tuner.model.parameters(), settings.clip)
        tuner.optimiser.step()
        tuner.average.update(_inner(tuner.model))
        total += value / settings.steps_per_epoch
    return total


def _streams(
    data: FinetuneData, extra: Any, settings: Any, tuner: Tuner
) -> list[tuple[Any, Iterator[Any], float, Any]]:
    from memscan.mitigation.finetune import draws

    timesteps = data.denoiser.timesteps
    ordinary = draws(data.pairs, settings, timesteps, tuner.epoch, 0)
    streams: list[tuple[Any, Iterator[Any], float, Any]] = [(data.pairs, ordinary, 1.0, data.empty_TD)]
    if extra is not None:
        streams.append((extra, draws(extra, settings, timesteps, tuner.epoch, 1), settings.weight, None))
    return streams


def _finetune_settings(settings: MitigationSettings) -> Any:
    from dataclasses import fields

    from memscan.mitigation.finetune import FinetuneSettings

    known = {field.name for field in fields(FinetuneSettings)}
    return FinetuneSettings(**{key: value for key, value in settings.model_dump().items() if key in known})


def _mean_over(workers: TrainingWorkers, value: Any) -> float:
    import torch.distributed as dist

    if workers.size > 1:
        dist.all_reduce(value)
    return float(value) / workers.size


def _unsynchronised(model: Any, wanted: bool) -> Any:
    return model.no_sync() if wanted and hasattr(model, "no_sync") else nullcontext()


def _inner(model: Any) -> Any:
    return getattr(model, "module", model)


def _save(folder: Path, tuner: Tuner, data: FinetuneData) -> None:
    from safetensors.torch import save_file

    from memscan.mitigation.finetune import flat_state

    weights = {name: value.detach().cpu().contiguous() for name, value in _inner(tuner.model).state_dict().items()}
    save_file(weights, str(folder / WEIGHTS))
    save_file({name: value.cpu().contiguous() for name, value in tuner.average.values.items()}, str(folder / AVERAGE))
    save_file(flat_state(tuner.optimiser.state_dict()), str(folder / OPTIMISER))
    if data.pool is not None:
        save_file(data.pool.tensors(), str(folder / POOL))
    state = {
        "epoch": tuner.epoch,
        "losses": tuner.losses,
        "average_steps": tuner.average.steps,
        "surrogates": data.ways,
    }
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def _load(folder: Path, unet: Any, average: Any, data: FinetuneData) -> dict[str, Any]:
    from safetensors.torch import load_file

    from memscan.mitigation.adversary import Pool

    unet.load_state_dict(load_file(str(folder / WEIGHTS)))
    average.values = {k: v.to(average.values[k].device) for k, v in load_file(str(folder / AVERAGE)).items()}
    if data.pool is not None:
        data.pool = Pool.of(load_file(str(folder / POOL)))
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return {**state, "optimiser": load_file(str(folder / OPTIMISER))}


def averaged(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the averaged weights by parameter name, and the state, of a job's last checkpoint."""
    from safetensors.torch import load_file

    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return load_file(str(checkpoint / AVERAGE)), state
