"""This module reports metrics to Prometheus through Ray: counters of a job's workers, and gauges of its driver.

Ray gathers the metrics of every process and serves them on the metrics port of its node (docs/operations.md), with
`ray_` before the name and `_total` behind that of a counter. Counters are those of the work: a block that is done again
is counted again. What a run has, each row once, are the driver's `memscan_committed_rows`.

Without Ray (the sample of a plan, a test of one stage) nothing is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from memscan.records import Label

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """This is one metric.

    Every metric has the tag `run` in addition to its own; it is the name of the census.

    Args:
        name: without the prefix and suffix that Ray adds.
        text: what it counts, with its unit.
        tags: closed sets of words, so that the number of series stays small.
    """

    name: str
    kind: Kind
    text: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """Return the names that Prometheus sees."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
        return (f"{name}_total",) if self.kind == "counter" else (name,)


ROWS = Metric("memscan_rows", "counter", "Rows that a stage has finished.", ("stage", "status"))
REJECTS = Metric("memscan_rejects", "counter", "Rows that a stage rejected or passed on rejected.", ("stage", "reason"))
LABELS = Metric("memscan_generations", "counter", "Generations judged.", ("label",))
CALLS = Metric("memscan_denoiser_calls", "counter", "Rows through the denoiser: a latent, a text, a timestep.")
BUSY = Metric("memscan_busy_seconds", "counter", "Seconds that workers spent in a stage.", ("stage", "device"))
STARTS = Metric("memscan_worker_starts", "counter", "Workers that have loaded their models.", ("worker",))
BLOCKS = Metric(
    "memscan_block_seconds",
    "histogram",
    "Seconds of a worker for one block.",
    ("worker",),
    (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0),
)
LOADS = Metric(
    "memscan_load_seconds",
    "histogram",
    "Seconds in which a worker loaded its models.",
    ("worker",),
    (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)
PROMPTS = Metric("memscan_prompts", "gauge", "Distinct prompts of the run.")
COMMITTED = Metric("memscan_committed_rows", "gauge", "Rows in committed parts, each once.", ("status",))
PARTS = Metric("memscan_parts", "gauge", "Parts of the run.", ("state",))
QUEUE = Metric("memscan_queue_rows", "gauge", "Rows that wait for a stage or are in it.", ("stage",))
WORKERS = Metric("memscan_workers", "gauge", "Workers that were asked for.", ("worker", "device"))

METRICS = (
    *(ROWS, REJECTS, LABELS, CALLS, BUSY, STARTS, BLOCKS, LOADS),
    *(PROMPTS, COMMITTED, PARTS, QUEUE, WORKERS),
)

# Ray's own objects by name: one per process, and none before Ray is there.
_made: dict[str, Any] = {}


@dataclass(frozen=True)
class Meters:
    """These are the metrics of one run, in any process; they can be pickled.

    Args:
        run: the census's name, the value of the tag `run`.
    """

    run: str

    def add(self, metric: Metric, value: float = 1, **tags: str) -> None:
        """Raise a counter; nothing is added where the value is 0."""
        if value > 0 and (made := _instrument(metric)) is not None:
            made.inc(value, {"run": self.run, **tags})

    def set(self, metric: Metric, value: float, **tags: str) -> None:
        """Set a gauge."""
        if (made := _instrument(metric)) is not None:
            made.set(value, {"run": self.run, **tags})

    def observe(self, metric: Metric, value: float, **tags: str) -> None:
        """Add one observation to a histogram."""
        if (made := _instrument(metric)) is not None:
            made.observe(value, {"run": self.run, **tags})

    @contextmanager
    def busy(self, stage: str, device: str) -> Iterator[None]:
        """Count the seconds of a `with` block as work."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(BUSY, time.perf_counter() - started, stage=stage, device=device.split(":")[0])

    def rows(self, stage: str, rows: int, notes: Mapping[str, int]) -> None:
        """Count what a stage reports: its rows, and among the notes rejects by reason and generations by label."""
        labels = {label.value for label in Label}
        rejects = {name: count for name, count in notes.items() if name not in labels}
        self.add(ROWS, rows - sum(rejects.values()), stage=stage, status="done")
        self.add(ROWS, sum(rejects.values()), stage=stage, status="rejected")
        for reason, count in rejects.items():
            self.add(REJECTS, count, stage=stage, reason=reason)
        for label in labels & notes.keys():
            self.add(LABELS, notes[label], label=label)


def forget() -> None:
    """Forget the metrics when Ray ends, because the next Ray cannot use them."""
    _made.clear()


def _instrument(metric: Metric) -> Any:
    """Ray's object for a metric; None if this process has no Ray."""
    if metric.name not in _made:
        import sys

        ray: Any = sys.modules.get("ray")  # a process that has not imported it has none running
        if ray is None or not ray.is_initialized():
            return None
        from ray.util import metrics

        tags = ("run", *metric.tags)
        if metric.kind == "histogram":
            made: Any = metrics.Histogram(metric.name, metric.text, list(metric.boundaries), tags)
        else:
            made = (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(metric.name, metric.text, tags)
        _made[metric.name] = made
    return _made[metric.name]
