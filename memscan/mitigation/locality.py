"""Is the memorisation of one image in one place? Three analyses after "Finding DoRI" (Kowalczuk et al. 2025).

Embeddings that all bring one image back, from many starts: do they lie together (`embedding_distance`), do they drive
the same units alike (`activation_distance`), does a localisation method choose the same units or weights for each
(`overlap`, `weight_overlap`)? What the pairs of one image give says little alone: it stands beside what pairs of
different images give (`Comparison`). Local memorisation would give small distances and overlaps near 1 within an
image, and not between images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from memscan.mitigation.units import Layout, UnitSet

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of pairwise values; `pairs` is their number, `undefined` how many had no value."""

    mean: float | None
    low: float | None
    high: float | None
    pairs: int
    undefined: int = 0

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        known = [value for value in values if value is not None]
        missing = len(values) - len(known)
        if not known:
            return cls(None, None, None, 0, missing)
        return cls(sum(known) / len(known), min(known), max(known), len(known), missing)


@dataclass(frozen=True)
class Comparison:
    """Values of pairs that belong to one image, and of pairs that belong to different ones."""

    within: Spread
    between: Spread

    @classmethod
    def of(cls, groups: Sequence[Sequence[T]], value: Callable[[T, T], float | None]) -> Comparison:
        """Of every pair.

        Args:
            groups: what was found for each image.
        """
        within = [value(a, b) for group in groups for a, b in combinations(group, 2)]
        between = [value(a, b) for one, other in combinations(groups, 2) for a in one for b in other]
        return cls(Spread.of(within), Spread.of(between))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def embedding_distance(a_TD: Tensor, b_TD: Tensor) -> float:
    """L2 distance of two embeddings, flattened."""
    return float(torch.linalg.vector_norm(a_TD.double() - b_TD.double()))


def activation_distance(a_U: Tensor, b_U: Tensor) -> float:
    """1 - cosine of two activations, in [0, 2]."""
    return 1 - float(torch.cosine_similarity(a_U.double(), b_U.double(), dim=0))


def activation_distances(groups: Sequence[Sequence[Tensor]], layout: Layout) -> dict[str, Comparison]:
    """By layer, distances of the units' activations, (units,) each."""
    split = [[layout.split(one_U) for one_U in group] for group in groups]
    return {
        name: Comparison.of([[parts[at] for parts in group] for group in split], activation_distance)
        for at, name in enumerate(layout.names)
    }


def overlap(a: UnitSet, b: UnitSet) -> float | None:
    """Intersection over union; None for two empty sets, which have no overlap to speak of."""
    together = len(a | b)
    return (len(a) + len(b) - together) / together if together else None


def weight_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float | None:
    """Intersection over union of chosen weights, boolean masks by parameter name; a name that is missing has none."""
    common = sum(int((a[name] & b[name]).sum()) for name in a.keys() & b.keys())
    together = sum(int(one.sum()) for masks in (a, b) for one in masks.values()) - common
    return common / together if together else None
