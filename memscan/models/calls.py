"""This module counts denoiser calls on the network itself, as the cost of a result.

A call is one row through the denoiser: one latent under one text at one timestep. A batch of 8 images with guidance is
16 calls. Every row that the network sees is counted, whoever called it and in whatever batches.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any


class CallCounter:
    """This counts the rows that go through a denoiser inside a `with` block.

    Args:
        denoiser: a torch module; its first argument, `sample` or `hidden_states` has one row per latent.
    """

    def __init__(self, denoiser: Any) -> None:
        self.calls = 0
        self._denoiser = denoiser
        self._hook: Any = None

    def __enter__(self) -> CallCounter:
        self._hook = self._denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _count(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        self.calls += len(latents)
