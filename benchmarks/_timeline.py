"""When the parts of a chain were at work: spans of calls, in two threads or on a GPU's streams, and what they cover.

On a CPU a span is the call's; on a GPU it runs from the stream's reaching the call to its being through with what the
call started, so that nothing waits for the measurement. What a GPU as a whole did is in its profiler's record.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks._machine import seconds, wait

Span = tuple[float, float]


class Timeline:
    """Spans by name, of the functions it has wrapped."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._origin = self._mark()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, every call of which is a span."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = self._mark()
            result = function(*arguments, **options)
            self._marks[name].append((start, self._mark()))
            return result

        return timed

    def clear(self) -> None:
        """Forget what was, between two measurements."""
        wait(self._device)
        self._marks.clear()
        self._origin = self._mark()

    def spans(self) -> dict[str, list[Span]]:
        """By name, in seconds since the last `clear`."""
        wait(self._device)
        return {name: [(self._at(a), self._at(b)) for a, b in marks] for name, marks in self._marks.items()}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _at(self, mark: Any) -> float:
        if self._device.type != "cuda":
            return float(mark - self._origin)
        return float(self._origin.elapsed_time(mark)) / 1000


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def busy(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds in which the device did anything during a call, and the call's own.

    On a GPU: at least one kernel or copy was running, from the profiler. On a CPU: the process's CPU time a thread.
    """
    if device.type != "cuda":
        before = time.process_time()
        wall = seconds(work, device)
        return (time.process_time() - before) / torch.get_num_threads(), wall
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = seconds(work, device)
    found = [one for one in profiler.events() if one.device_type == DeviceType.CUDA and not one.is_user_annotation]
    return covered((one.time_range.start / 1e6, one.time_range.end / 1e6) for one in found), wall
