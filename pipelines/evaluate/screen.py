"""This module chooses the threshold of a screen from a reduced run that had no screen."""

from __future__ import annotations

import torch

from memscan.census.flagged import NAMES
from memscan.config import ScreenConfig
from memscan.detection.decide import ScreenThreshold, choose_threshold
from memscan.errors import RunError
from memscan.io import storage
from memscan.models.generator import Generator
from memscan.records import Status
from memscan.worker.screen import Screen
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table


def threshold_of_run(run_dir: str, rule: ScreenConfig, *, target: float, confidence: float = 0.95) -> ScreenThreshold:
    """Choose a threshold from a reduced run without a screen.

    Its flagged prompts must be caught, and its other prompts show the cost.

    Args:
        rule: detector, timestep and seeds; its threshold does not matter.

    Raises:
        RunError: the run is not complete or not reduced, was screened itself, or has no flagged prompt.
        ModelError: the detector does not apply to the model.
    """
    run = Run.load(run_dir)
    config = run.config()
    flagged_file = storage.join(run_dir, "flagged", NAMES[0])
    if run.state != "complete" or not storage.exists(flagged_file):
        raise RunError("not a complete and reduced run", where=run_dir, hint=f"run: memscan reduce {run_dir}")
    if config.screen is not None:
        raise RunError(
            "was itself scanned with a screen, and the labels of what the screen passed are not known",
            where=run_dir,
            hint="give a run without a screen",
        )
    flagged = set(read_table(flagged_file, ["prompt_id"])["prompt_id"].to_pylist())
    if not flagged:
        raise RunError("has no flagged prompt to choose a threshold by", where=run_dir)
    rows = [row for number in run.parts for row in run.prompts(number).to_pylist()]
    captions = {row["prompt_id"]: row["caption"] for row in rows if row["status"] == Status.DONE.value}
    device = "cuda" if config.resources.device != "cpu" and torch.cuda.is_available() else "cpu"
    screen = Screen(rule, Generator.load(config.generator, device, resources=config.resources))
    scores = dict(zip(captions, screen.scores(list(captions.values())), strict=True))
    memorised = [score for name, score in scores.items() if name in flagged]
    ordinary = [score for name, score in scores.items() if name not in flagged]
    return choose_threshold(memorised, ordinary, target=target, confidence=confidence)
