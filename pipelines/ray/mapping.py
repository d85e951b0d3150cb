"""This module spreads a function over items by Ray Data on a cluster.

A small amount of work is done in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa


def spread(work: Callable[[int], int], items: int, *, here: bool = False, cpus: float = 1.0) -> None:
    """Call `work` with each number below `items`.

    Args:
        work: picklable; leaves what it makes in storage, and can be called again.
        here: in this process, one after another: starting a worker would take longer.
        cpus: of each call.
    """
    if here:
        for item in range(items):
            work(item)
        return
    import ray.data

    blocks = [pa.table({"item": [item]}) for item in range(items)]
    calls = ray.data.from_arrow(blocks).map_batches(_call, fn_args=(work,), batch_size=1, num_cpus=cpus, **_FORMAT)
    for _ in calls.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass


_FORMAT: dict[str, Any] = {"batch_format": "pyarrow"}


def _call(batch: pa.Table, work: Callable[[int], int]) -> pa.Table:
    return pa.table({"item": [work(item) for item in batch["item"].to_pylist()]})
