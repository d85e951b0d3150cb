"""This module overlaps two halves of the work on a block: a chunk is sampled while the one before it is classified.

Each half has one thread, so that nothing else about it changes: chunks come in order, results go out in order, and an
exception of either half is raised. The halves exchange arrays on the host. On a GPU each thread has its own stream, so
that the judging half's kernels, copies and waits never make the sampling half wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")


def overlapped(
    chunks: Sequence[T], first: Callable[[T], U], second: Callable[[U], V], *, device: str = "cpu"
) -> list[V]:
    """Return `[second(first(chunk)) for chunk in chunks]`.

    `second` of a chunk runs beside `first` of the next one.

    At most one chunk waits between the halves: a slow second half holds the first one back, and memory stays bounded.
    """
    if len(chunks) < 2:
        return [second(first(chunk)) for chunk in chunks]
    results: list[V] = []
    with ThreadPoolExecutor(1, thread_name_prefix="judge") as pool:
        pending: Future[V] | None = None
        for chunk in chunks:
            made = first(chunk)
            if pending is not None:
                results.append(pending.result())
            pending = pool.submit(_on_stream, second, made, device)
        assert pending is not None
        results.append(pending.result())
    return results


def chunks_of(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return the items in runs of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def flat(parts: Sequence[Sequence[T]]) -> Iterator[T]:
    """Return the items of all parts."""
    return (item for part in parts for item in part)


def _on_stream(second: Callable[[U], V], made: U, device: str) -> V:
    with _stream(device):
        return second(made)


def _stream(device: str) -> AbstractContextManager[Any]:
    if not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
