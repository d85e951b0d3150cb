"""This module shows progress while a job runs.

There is one bar per stage with rows/s and time left, or lines if there is no terminal.

Stages report batches to a `ProgressCounts`, a Ray actor without a CPU of its own; a thread of the driver
(`ProgressDisplay`) polls it. The same figures go to `logs/progress.json`, so that `memscan status` sees a run from
outside. Counts say what was worked on, and are only for display: a batch that Ray retries is counted twice here (and
capped), and never in a run's own counts.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipelines.ray.logs import json_line, speaks_json

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0
HEARTBEAT_SECONDS = 60.0  # a line that says nothing new comes this often


@dataclass(frozen=True)
class Seen:
    """This is what one stage has reported so far.

    Args:
        seconds: from its first report (a worker is ready) to its last.
        notes: counts by name, e.g. labels.
        starts: workers that have become ready; more than were asked for means that some were lost.
    """

    rows: int
    seconds: float
    notes: dict[str, int]
    starts: int = 0


class ProgressCounts:
    """This adds up reports by stage; it lives in an actor."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: Counter[str] = Counter()
        self._notes: dict[str, Counter[str]] = {}
        self._times: dict[str, tuple[float, float]] = {}
        self._starts: Counter[str] = Counter()

    def add(self, stage: str, rows: int, notes: Mapping[str, int]) -> None:
        now = self._clock()
        self._rows[stage] += rows
        self._notes.setdefault(stage, Counter()).update(notes)
        # Another worker that becomes ready is a report without rows, and no sign of speed.
        self._starts[stage] += rows == 0
        first, last = self._times.get(stage, (now, now))
        self._times[stage] = first, now if rows else last

    def read(self) -> dict[str, Seen]:
        return {
            stage: Seen(self._rows[stage], last - first, dict(self._notes[stage]), self._starts[stage])
            for stage, (first, last) in self._times.items()
        }


class Reporter:
    """Stages call this to send a batch's counts to the tally without waiting. It can be pickled."""

    def __init__(self, tally: Any) -> None:
        self._tally = tally

    def __call__(self, stage: str, rows: int, notes: Mapping[str, int]) -> None:
        self._tally.add.remote(stage, rows, dict(notes))


@dataclass
class ProgressBar:
    """These are the figures of one stage.

    Args:
        total: rows to be done in all.
        before: of these, rows that earlier calls of the run have done.
    """

    name: str
    unit: str
    total: int
    before: int = 0
    seen: Seen | None = None
    changed: float = 0.0

    def update(self, seen: Seen, now: float) -> None:
        if self.seen is None or seen.rows != self.seen.rows:
            self.changed = now
        self.seen = seen

    @property
    def done(self) -> int:
        return min(self.total, self.before + (self.seen.rows if self.seen else 0))

    @property
    def rate(self) -> float | None:
        """This is rows per second since the stage's first worker was ready, up to its last report."""
        if self.seen is None or self.seen.rows == 0 or self.seen.seconds <= 0:
            return None
        return self.seen.rows / self.seen.seconds

    def left(self, now: float) -> float | None:
        """This is the remaining time in seconds."""
        if self.rate is None:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (now - self.changed))

    def figures(self, now: float) -> dict[str, Any]:
        """Return what `memscan status` and the logs show of the stage.

        The rate is in rows per second, and the time left in seconds.
        """
        seen = self.seen or Seen(0, 0.0, {})
        figures = {"stage": self.name, "unit": self.unit, "done": self.done, "total": self.total, "rate": self.rate}
        return {**figures, "left": self.left(now), "starts": seen.starts, "notes": seen.notes}

    def text(self, now: float) -> str:
        share = f"{100 * self.done / self.total:.0f} %" if self.total else "100 %"
        parts = [f"{self.name:<7} {self.done:,}/{self.total:,} {self.unit} ({share})"]
        if self.seen is None and self.done < self.total:
            parts.append("loading models")
        if (rate := self.rate) is not None:
            parts.append(f"{rate:.3g}/s")
        if (left := self.left(now)) is not None and self.done < self.total:
            parts.append(f"{clock(left)} left")
        notes = self.seen.notes if self.seen else {}
        parts += [f"{name} {count:,}" for name, count in sorted(notes.items())]
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Return seconds as 42 s, 3:05 or 2:10:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class ProgressDisplay:
    """This shows bars until they are closed.

    Args:
        read: gives rows and notes by stage, as `ProgressCounts.read`.
        stream: where to draw; standard error when not given.
        state: file that receives the figures as JSON.
        line_seconds: time between lines where `stream` is not a terminal.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Seen]],
        stream: TextIO | None = None,
        state: Path | None = None,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self._read, self._state, self._line_seconds = read, state, line_seconds
        self._stream = stream or sys.stderr
        self._bars: list[ProgressBar] = []
        self._on_update: Callable[[Sequence[ProgressBar]], None] = lambda bars: None
        self._stop = threading.Event()

    @contextmanager
    def show(
        self, *bars: ProgressBar, on_update: Callable[[Sequence[ProgressBar]], None] = lambda bars: None
    ) -> Iterator[None]:
        """Follow these stages for the length of the block.

        Args:
            on_update: called with the stages whenever their figures are new, from the thread that follows them.
        """
        self._bars, self._on_update, self._stop = list(bars), on_update, threading.Event()
        follow = self._draw if self._stream.isatty() and not speaks_json() else self._print
        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(timeout=5)

    def _poll(self) -> Mapping[str, Seen]:
        try:
            return self._read()
        except Exception:  # a picture of the work must not end the work; the next poll tries again
            return {}

    def _refresh(self) -> float:
        now = time.monotonic()
        seen = self._poll()
        for bar in self._bars:
            if bar.name in seen:
                bar.update(seen[bar.name], now)
        if self._state is not None:
            figures = [bar.figures(now) for bar in self._bars]
            _replace(self._state, json.dumps({"time": time.time(), "stages": figures}))
        self._on_update(self._bars)
        return now

    def _print(self) -> None:
        stopped, shown, silent = False, "", 0.0
        while not stopped:
            stopped = self._stop.wait(self._line_seconds)
            now = self._refresh()
            text = " | ".join(bar.text(now) for bar in self._bars)
            silent += self._line_seconds
            if text != shown or silent >= HEARTBEAT_SECONDS:
                if speaks_json():
                    text_lines = [json_line("progress", **bar.figures(now)) for bar in self._bars]
                else:
                    text_lines = [text]
                print("\n".join(text_lines), file=self._stream, flush=True)
                shown, silent = text, 0.0

    def _draw(self) -> None:
        columns = (TextColumn("{task.fields[text]}"), BarColumn(bar_width=24))
        with Progress(*columns, console=Console(file=self._stream), transient=False) as progress:
            tasks = [progress.add_task("", total=bar.total or 1, text=bar.text(0)) for bar in self._bars]
            stopped = False
            while not stopped:
                stopped = self._stop.wait(POLL_SECONDS)
                now = self._refresh()
                for bar, task in zip(self._bars, tasks, strict=True):
                    progress.update(task, completed=bar.done if bar.total else 1, text=bar.text(now))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def progress_display(state: Path | None = None) -> Iterator[tuple[ProgressDisplay, Reporter]]:
    """Open a display and the reporter that feeds it; needs a running Ray."""
    import ray

    # Reports are small and many; the actor has no CPU of its own and restarts empty if its node goes.
    tally: Any = ray.remote(num_cpus=0, max_restarts=-1)(ProgressCounts)
    tally = tally.remote()
    try:
        yield ProgressDisplay(lambda: ray.get(tally.read.remote(), timeout=5), state=state), Reporter(tally)
    finally:
        ray.kill(tally)
