"""A Ray Train loop in this process: a team of one, without Ray's worker processes, which take ten seconds to come up.

The loop and everything it calls are the real ones; what is replaced is `train` and the four functions of ray.train that
loops call. The job travels through Ray's pickle as it would to a worker. What only Ray can show (two workers, a killed
process) has tests of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


class Alone:
    """Runs loops here, and counts them.

    Args:
        die_after: raise in the loop after its so many-th checkpoint, once, and start it from there again, as Ray Train
            does when a worker dies.
    """

    def __init__(self, die_after: int | None = None) -> None:
        self.die_after = die_after
        self.runs = self.deaths = 0
        self._folder = Path()
        self._metrics: dict[str, Any] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        import ray.train
        import ray.train.torch

        from tests.support import local_ray

        local_ray.install(patch)

        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray.train, "get_checkpoint", self._checkpoint)
        patch.setattr(ray.train, "report", self._report)
        patch.setattr(ray.train.torch, "prepare_model", lambda model: model)
        for module in ("pipelines.ray.training", "pipelines.mitigate.job", "pipelines.evaluate.locality"):
            patch.setattr(f"{module}.train", self.train)

    def train(
        self,
        loop: Callable[[dict[str, Any]], None],
        job: Mapping[str, Any],
        *,
        storage: Path,
        name: str,
        workers: int,
        gpus: bool,
    ) -> tuple[dict[str, Any], Path | None]:
        import torch
        from ray import cloudpickle

        from memscan.errors import MemscanError

        assert workers == 1
        self._folder = storage.resolve() / name  # as the real one does
        self.runs += 1
        sent, threads, here = cloudpickle.dumps(dict(job)), torch.get_num_threads(), os.getcwd()
        self._folder.mkdir(parents=True, exist_ok=True)
        os.chdir(self._folder)  # Ray Train gives its workers a directory of their own
        try:
            loop(cloudpickle.loads(sent))
        except Death:
            loop(cloudpickle.loads(sent))
        finally:
            os.chdir(here)
            torch.set_num_threads(threads)
        if failed := self._metrics.get("failed"):
            shutil.rmtree(self._folder)
            raise MemscanError(str(failed), where=name, hint="nothing was written")
        return self._metrics, self._last()

    def _last(self) -> Path | None:
        return max(self._folder.glob("checkpoint_*"), default=None)

    def _checkpoint(self) -> Any:
        import ray.train

        last = self._last()
        return ray.train.Checkpoint.from_directory(str(last)) if last else None

    def _report(self, metrics: dict[str, Any], checkpoint: Any = None) -> None:
        self._metrics = metrics
        number = len(list(self._folder.glob("checkpoint_*")))
        if checkpoint is not None:
            shutil.copytree(checkpoint.path, self._folder / f"checkpoint_{number:06d}")
        if self.die_after == number + 1 and not self.deaths:
            self.deaths += 1
            raise Death


class Death(Exception):
    """A worker's end."""
