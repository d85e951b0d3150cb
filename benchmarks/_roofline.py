"""What a call must compute and move, counted on tensors without values, and the least time that a device needs for it.

Every operation that reaches the dispatcher is one kernel, or about one: its arithmetic is PyTorch's own count
(`torch.utils.flop_counter`, 2 per multiply-add), its traffic is every tensor that it reads and every tensor that it
writes, once. A view moves nothing. Attention counts as one fused kernel, which reads q, k and v and writes its output.
The least time of an operation is the greater of its arithmetic at the matrix peak and its traffic at the copy bandwidth
(Williams et al. 2009, "Roofline"); that of a call is their sum, since eager kernels run one after another.

Predictions are lower bounds: no kernel runs at both peaks, and launches of small ones are not free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Peaks:
    """What a device reaches at best.

    Args:
        flops: FLOP/s of a large matrix product in the precision of the networks.
        bandwidth: bytes/s of a copy from device memory to device memory, bytes read and written both counted.
        name: of the device.
    """

    flops: float
    bandwidth: float
    name: str


# Measured on one, 2026-10: an 8192^3 product in bfloat16 on random data, and a copy of 8.6 GB (docs/speed.md).
H200 = Peaks(788e12, 4.3e12, "NVIDIA H200")


@dataclass
class Work:
    """Operations of a call.

    Args:
        flops: arithmetic in all.
        moved: bytes read and written in all.
        kernels: operations that compute or move something.
        operations: (arithmetic, bytes) of each of them.
        reads: values that the host waited for, by the operation that gave them.
        copied: bytes between host and device.
    """

    flops: float = 0.0
    moved: float = 0.0
    kernels: int = 0
    operations: list[tuple[float, float]] = field(default_factory=list)
    reads: Counter[str] = field(default_factory=Counter)
    copied: int = 0

    def seconds(self, peaks: Peaks) -> float:
        """The least time of the call on a device."""
        return sum(max(flops / peaks.flops, moved / peaks.bandwidth) for flops, moved in self.operations)

    def add(self, flops: float, moved: float) -> None:
        """Count one operation."""
        self.flops += flops
        self.moved += moved
        self.kernels += 1
        self.operations.append((flops, moved))

    def to_json(self, peaks: Peaks) -> dict[str, float]:
        """The figures of a prediction."""
        return {
            "tflop": self.flops / 1e12,
            "gigabytes": self.moved / 1e9,
            "kernels": self.kernels,
            "seconds": self.seconds(peaks),
        }


_VIEWS = ("view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze")
_VIEWS += ("detach", "alias", "as_strided", "split", "chunk", "unbind", "split_with_sizes", "_reshape_alias", "empty")
_VIEWS += (
    "empty_like",
    "new_empty",
    "empty_strided",
    "lift_fresh",
    "is_same_size",
    "sym_size",
    "diagonal",
    "narrow",
    "unfold",
)
_READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")


class _Attention(TorchFunctionMode):
    """Counts a call of `scaled_dot_product_attention` as one kernel, whichever kernel this device would take."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *((kwargs or {})[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        products = 2 * query.shape[:-2].numel() * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self._work.add(float(products), float(sum(_bytes(one) for one in (query, key, value, out))))
        return out


class _Dispatch(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func._overloadpacket
        name = packet.__name__
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if name in _READS and any(one.device.type != "cpu" for one in tensors):
            self._work.reads[name] += 1
            if name == "_local_scalar_dense" and tensors[0].device.type == "meta":
                return 0  # there is no value to read: the loop goes on, and the count says that it asked
        if packet not in flop_registry:  # in inference mode composite operations arrive whole
            with self:
                whole = func.decompose(*args, **(kwargs or {}))
            if whole is not NotImplemented:
                return whole
        out = func(*args, **(kwargs or {}))
        made = [one for one in tree_flatten(out)[0] if isinstance(one, Tensor)]
        if len({one.device.type for one in (*tensors, *made)}) > 1 and made and name in ("_to_copy", "copy_"):
            self._work.copied += _bytes(made[0])
        if name not in _VIEWS and any(one.device.type != "cpu" for one in made):
            count = flop_registry.get(packet)
            flops = float(count(*args, **(kwargs or {}), out_val=out)) if count is not None else 0.0
            self._work.add(flops, float(sum(_bytes(one) for one in (*tensors, *made) if one.device.type != "cpu")))
        return out


@contextmanager
def counted() -> Iterator[Work]:
    """Count what runs inside the block on a device other than the host: on tensors of device `meta`, for one."""
    work = Work()
    with _Attention(work), _Dispatch(work):
        yield work


def work_of(call: Callable[[], object]) -> Work:
    """Count one call."""
    with torch.no_grad(), counted() as work:
        call()
    return work


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
