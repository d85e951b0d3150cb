"""This module runs the workers of one Ray Train job.

It has what they exchange, what they checkpoint, and how they are started.

Every rank calls `gather` and `report` equally often. Results are gathered in the order of ranks, checkpoints are
written by rank 0 and held by Ray under the job's storage path; the job's name carries the fingerprint of what it
does, so a rerun resumes it and another job never does.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memscan.errors import MemscanError
from pipelines.ray.causes import user_error

T = TypeVar("T")
STATE = "state.json"
FAILURES = 3
AGAIN = "give the same command again: it continues from the last checkpoint"


@dataclass(frozen=True)
class TrainingWorkers:
    """This is the place of this worker among the workers."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> TrainingWorkers:
        import ray.train

        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size())

    def gather(self, value: T) -> list[T]:
        """Return every worker's value, in the order of ranks."""
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, count: int) -> range:
        """Return the positions of this worker's part of `count` items."""
        return range(self.rank, count, self.size)

    def shared(self, count: int, work: Callable[[int], T]) -> list[T]:
        """Do `work` for positions 0 to count - 1, shared out; return all results in order, on every worker."""
        parts = self.gather([(at, work(at)) for at in self.share(count)])
        return [value for _, value in sorted((item for part in parts for item in part), key=lambda item: item[0])]

    def report(self, metrics: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Write a checkpoint (by rank 0) and report; `write` fills the checkpoint's folder."""
        import ray.train

        if self.rank != 0:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))

    def report_state(self, metrics: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Report with a JSON document as checkpoint."""
        self.report(metrics, lambda folder: _write_json(folder / STATE, state))


def _write_json(path: Path, state: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(state), encoding="utf-8")


def resumed(read: Callable[[Path], T]) -> T | None:
    """Return what the last checkpoint of this job holds, or None if there is none."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return read(Path(folder))


def read_state(folder: Path) -> dict[str, Any]:
    """Return the JSON document of a checkpoint."""
    document: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return document


def train(
    loop: Callable[[dict[str, Any]], None],
    job: Mapping[str, Any],
    *,
    storage: Path,
    name: str,
    workers: int,
    gpus: bool,
) -> tuple[dict[str, Any], Path | None]:
    """Run a loop on workers until it ends, restarting it from its last checkpoint when a worker dies.

    Returns:
        The last reported metrics, and the folder of the last checkpoint.

    Raises:
        MemscanError: Ray lost the actor that leads the workers, or one of them raised a MemscanError.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    storage.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        loop,
        train_loop_config=dict(job),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        # Half a CPU, as the scan's actors: on two cores there is room for two workers beside Ray's own tasks.
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpus, resources_per_worker={"GPU": 1} if gpus else {"CPU": 0.5}
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        cause = user_error(error) or _worker_error(error)
        if cause is not None:
            raise cause from error
        if isinstance(error, ray.train.ControllerError):
            # Not tried again here: an actor that only cannot be reached may still be at work in this process's job.
            line = " ".join(str(error).split())[:200]
            raise MemscanError(f"Ray lost the actor that leads the workers ({line})", where=name, hint=AGAIN) from error
        raise
    failed = (result.metrics or {}).get("failed")
    if failed:  # and would again: the same job goes the same way
        shutil.rmtree(storage / name, ignore_errors=True)
        raise MemscanError(str(failed), where=name, hint="nothing was written")
    return dict(result.metrics or {}), Path(result.checkpoint.path) if result.checkpoint else None


def _worker_error(error: BaseException) -> MemscanError | None:
    """Return the first MemscanError that a worker raised; Ray Train keeps them by rank."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = (getattr(one, "_base_exc", one) for one in failures.values())  # it wraps what a loop raised
    return next((found for one in inner if (found := user_error(one)) is not None), None)
