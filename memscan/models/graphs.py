"""This module uses CUDA graphs: a function's kernels are recorded once per shape and replayed with one launch.

This helps with small batches and small networks, which a GPU runs faster than Python can start kernels. The function
must not make decisions that depend on values, and should have few shapes, because each shape holds its own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # runs before recording: libraries choose their kernels and allocate in the first ones
MAX_SHAPES = 8


class Graphed:
    """This replays `function`.

    It takes and returns nested dicts and tuples of CUDA tensors; on other devices the function runs as it is.

    Results are copies: they stay as they are when the graph is replayed.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._recorded: dict[Any, tuple[list[Tensor], torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        tensors, structure = pytree.tree_flatten(arguments)
        if tensors[0].device.type != "cuda":
            return self._function(*arguments)
        key = (structure, *((one.shape, one.dtype) for one in tensors))
        if key not in self._recorded:
            if len(self._recorded) >= MAX_SHAPES:
                return self._function(*arguments)
            self._recorded[key] = self._record(tensors, structure)
        static, graph, result = self._recorded[key]
        for place, tensor in zip(static, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return pytree.tree_map(torch.clone, result)

    def _record(self, tensors: list[Tensor], structure: Any) -> tuple[list[Tensor], torch.cuda.CUDAGraph, Any]:
        static = [tensor.clone() for tensor in tensors]
        arguments = pytree.tree_unflatten(static, structure)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._function(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be judging the batch before on this device: only this thread's calls are recorded.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._function(*arguments)
        return static, graph, result
