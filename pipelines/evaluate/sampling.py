"""This module samples a run's prompts again in faster modes, and compares their verdicts with those of plain sampling.

It is one process on one device, without Ray, because a sample of the prompts is enough. The models are loaded once per
mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from memscan.config import CensusConfig, parse_config
from memscan.errors import RowReject, RunError
from memscan.evaluation.sampling import MODES, PLAIN, REJECTED, Mode, compare_labels
from memscan.records import Status
from memscan.worker.classification import CopyClassifier
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generation import GenerationWorker
from memscan.worker.prompt import Prompt
from pipelines.ray.stage import StageSetup
from pipelines.run_folder.runs import Run
from pipelines.scan.stages import open_classifier

_PROMPTS_AT_ONCE = 64


def measure_agreement(
    run_dir: str,
    names: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    prompts: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare the verdicts of each mode with those of the plain one.

    Args:
        run_dir: a complete run: its prompts, models, index and thresholds.
        names: of `MODES`.
        overrides: `key=value` for its configuration, such as generator.steps=50.
        prompts: how many, drawn at random from those that were done; 0 for all.

    Returns:
        JSON values: settings, `seconds` of the plain way and, in `modes`, what `compare` gives and `seconds`.

    Raises:
        RunError: the run is not complete, or none of its prompts was done.
        ConfigError: an override does not validate.
    """
    run = Run.load(run_dir)
    if run.state != "complete":
        raise RunError(f"the run is not complete (state: {run.state})", where=run_dir, hint="finish the scan first")
    config = _without_screen(parse_config(run.config().model_dump(mode="json"), overrides, where=run_dir))
    chosen = _prompts(run, prompts, seed)
    device = "cuda" if config.resources.device != "cpu" and torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    encoder = RegionEncoder(config, device, threads)
    setup = StageSetup(config, device, threads, run.index, run.manifest["index"].get("version"))
    classifier = open_classifier(setup, encoder)

    def labels(mode: Mode) -> tuple[dict[tuple[str, int], str], float]:
        changed = _changed(_changed(config, PLAIN), mode)
        sampler = GenerationWorker(changed, device, threads, encoder=encoder)
        started = time.perf_counter()
        return _labels(sampler, classifier, chosen), time.perf_counter() - started

    plain, seconds = labels(PLAIN)
    progress(f"plain: {seconds:.0f} s")
    modes = {}
    for name in names:
        other, taken = labels(MODES[name])
        modes[name] = row = {**compare_labels(plain, other), "seconds": taken}
        progress(f"{name}: {taken:.0f} s, {row['equal']} of {row['generations']} verdicts equal")
    return {
        "run": {"name": config.name, "fingerprint": run.manifest["fingerprint"]},
        "device": device,
        "prompts": len(chosen),
        "samples": config.generator.samples,
        "steps": config.generator.steps,
        "scheduler": config.generator.scheduler,
        "guidance": config.generator.guidance,
        "thresholds": [config.metric.foreground_threshold, config.metric.background_threshold],
        "seconds": seconds,
        "modes": modes,
    }


def _without_screen(config: CensusConfig) -> CensusConfig:
    """Every prompt is sampled, in full."""
    return config.model_copy(update={"screen": None})


def _changed(config: CensusConfig, mode: Mode) -> CensusConfig:
    data = config.model_dump()
    data["generator"] |= mode.generator
    data["resources"] |= mode.resources
    return CensusConfig.model_validate(data)


def _prompts(run: Run, count: int, seed: int) -> list[Prompt]:
    tables = [run.prompts(number) for number in run.parts]
    rows = [row for table in tables for row in table.to_pylist() if row["status"] == Status.DONE.value]
    if not rows:
        raise RunError("none of its prompts was done", where=run.folder.path)
    if 0 < count < len(rows):
        rows = [rows[at] for at in sorted(np.random.default_rng(seed).choice(len(rows), count, replace=False))]
    return [Prompt(row["prompt_id"], row["caption"]) for row in rows]


def _labels(
    sampler: GenerationWorker, classifier: CopyClassifier, prompts: Sequence[Prompt]
) -> dict[tuple[str, int], str]:
    """By prompt and sample; every sample of a prompt that was rejected is `REJECTED`."""
    found: dict[tuple[str, int], str] = {}
    samples = sampler.config.generator.samples
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        part = prompts[start : start + _PROMPTS_AT_ONCE]
        for prompt, row in zip(part, classifier(sampler(part)), strict=True):
            names = [REJECTED] * samples if isinstance(row, RowReject) else [record["label"] for record in row]
            found |= {(prompt.prompt_id, sample): name for sample, name in enumerate(names)}
    return found
