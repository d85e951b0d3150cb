"""This module reports events of a scan to the log of its run and to Prometheus; it decides nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from pipelines.ray.layout import PoolLayout
from pipelines.ray.logs import RunLog
from pipelines.ray.metrics import COMMITTED, PARTS, PROMPTS, QUEUE, WORKERS, Meters
from pipelines.ray.progress import ProgressBar
from pipelines.run_folder.identity import code_version
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts


class RunEvents:
    """These are the events of one call of a scan.

    Args:
        name: of the census.
    """

    def __init__(self, run: Run, log: RunLog, name: str) -> None:
        self._run, self._log, self._meters = run, log, Meters(name)
        self._total = Counts()
        self._committed = 0
        self._workers: list[tuple[str, str, int]] = []
        self._pools: dict[str, int] = {}
        self._starts: dict[str, int] = {}  # that are no surprise

    def begin(self) -> None:
        """The inputs are good and the lease is held."""
        run = self._run
        prompts: dict[str, Any] = {key: run.manifest["prompts"][key] for key in ("rows_read", "distinct", "parts")}
        place: dict[str, Any] = {"out": run.folder.path, "host": socket.gethostname(), "pid": os.getpid()}
        self._log("scan begins", **prompts, **place, version=code_version(), identity=run.manifest["fingerprint"])

    def shaped(self, layout: PoolLayout, done: Counts, parts: int) -> None:
        """The index is there and the workers are asked for.

        Args:
            done: counts of the parts that earlier calls committed, and how many these are.
        """
        self._total, self._committed = done, parts
        index = self._run.manifest["index"]
        self._log("index is ready", stage="index", references=index["count"], version=index["version"])
        pools = {"sample": layout.samplers, "judge": layout.judges} if layout.judges else {"census": layout.samplers}
        self._workers = [(name, "cpu" if name == "judge" else layout.device, count) for name, count in pools.items()]
        for worker, device, count in self._workers:
            self._log("workers asked for", stage=worker, workers=count, device=device, block=layout.block)
        self._pools = {"sample": layout.samplers, "judge": layout.judges or layout.samplers}

    def wave(self, parts: int, rows: int) -> None:
        """Report that Ray is given this number of parts, with new workers."""
        self._log("wave begins", parts=parts, rows=rows)
        self._starts = {stage: self._starts.get(stage, 0) + count for stage, count in self._pools.items()}

    def commit(self, number: int) -> Counts:
        """Commit a part, and report it."""
        counts = self._run.commit(number)
        self._total += counts
        self._committed += 1
        self._log("part committed", stage="commit", part=number, **counts.to_json())
        return counts

    def update(self, bars: Sequence[ProgressBar]) -> None:
        """Report new figures of the stages: gauges, and workers that replaced lost ones."""
        before = int(self._run.manifest["prompts"]["distinct"])
        for bar in bars:
            self._meters.set(QUEUE, max(0, before - bar.done), stage=bar.name)
            before = bar.done
            starts = bar.seen.starts if bar.seen else 0
            if starts > self._starts.get(bar.name, starts):
                self._log("a worker was started again", level="warning", stage=bar.name, starts=starts)
                self._starts[bar.name] = starts
        self._meters.set(QUEUE, max(0, before - self._total.rows), stage="commit")
        self._gauges()

    def end(self, counts: Counts) -> None:
        self._log("scan is complete", **counts.to_json())

    def stopped(self, state: str, error: str | None = None) -> None:
        """Report that the scan was interrupted or failed."""
        level = "error" if state == "failed" else "warning"
        self._log(f"scan {state}", level=level, error=error, rows=self._total.rows, parts=self._committed)

    def _gauges(self) -> None:
        """All of them again: Ray forgets a gauge that has not been set for a while."""
        for worker, device, count in self._workers:
            self._meters.set(WORKERS, count, worker=worker, device=device)
        self._meters.set(PROMPTS, self._run.manifest["prompts"]["distinct"])
        self._meters.set(COMMITTED, self._total.done, status="done")
        self._meters.set(COMMITTED, self._total.rejected, status="rejected")
        self._meters.set(PARTS, self._committed, state="committed")
        self._meters.set(PARTS, len(self._run.parts), state="total")
