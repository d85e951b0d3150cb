"""This module holds the specification of a detector: what it needs, what it costs, and its source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Need(str, Enum):
    """A detector needs this of a model or a run."""

    GUIDANCE = "an unconditional prediction"
    CROSS_ATTENTION = "cross-attention to the caption"
    SEVERAL_SEEDS = "at least two seeds"
    SEVERAL_GENERATIONS = "at least two generations made together"
    REFERENCES = "training images to compare with"
    MEANING = "an image encoder for meaning (signals.semantic)"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class DetectorSpec:
    """This is the specification of a detector.

    Args:
        name: its name in tables, configurations and `GENERATION.signals`.
        source: the paper.
        needs: without one of these it does not apply.
        calls: denoiser calls per prompt and seed that it makes in all, the first step included, its share of the cached
            unconditional predictions left out. Of one that is taken while a scan samples: those it adds, none.
    """

    name: str
    source: str
    needs: frozenset[Need] = frozenset()
    calls: int = 0

    def missing(self, available: Iterable[Need]) -> list[str]:
        """Return in words why the detector does not apply; the text is empty if it applies."""
        return sorted(need.value for need in self.needs - set(available))
