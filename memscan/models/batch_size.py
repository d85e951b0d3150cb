"""This module finds batch sizes by trying: the largest that fits into memory, and the fastest for a decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from memscan.config import PROBED_IMAGES

# Of the largest batch that fits, so much is used: the judging half of an actor needs memory beside it, and the
# allocator's cache is never packed tightly.
SHARE = 0.75


def largest_batch(run: Callable[[int], object], *, most: int = PROBED_IMAGES, share: float = SHARE) -> int:
    """Return a number of images per batch.

    It is a share of the largest power of two with which `run` does not run out of memory.

    Args:
        run: does the work for the given number of images; raises `torch.OutOfMemoryError` if they do not fit.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    fits = 0
    size = 1
    while size <= most:
        try:
            run(size)
        except torch.OutOfMemoryError:
            if not fits:
                raise
            break
        finally:
            _release()
        fits, size = size, 2 * size
    return max(1, fits if fits == most else int(fits * share))


def fastest_size(run: Callable[[int], object], sizes: Sequence[int], *, device: torch.device) -> int:
    """Return the size with the least time per item; sizes that run out of memory are left out.

    Args:
        run: does the work for the given number of items.
        sizes: to be tried, ascending.

    Raises:
        torch.OutOfMemoryError: not even the first size fits.
    """
    best, least = 0, float("inf")
    for size in sizes:
        try:
            run(size)  # the first run chooses kernels
            seconds = _seconds(lambda size=size: run(size), device) / size  # type: ignore[misc]
        except torch.OutOfMemoryError:
            if not best:
                raise
            break
        finally:
            _release()
        if seconds < least:
            best, least = size, seconds
    return best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
