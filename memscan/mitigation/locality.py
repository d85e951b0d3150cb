"""Is the memorisation of one image in one place? Three analyses after "Finding DoRI" (Kowalczuk et al. 2025).

Embeddings that all bring one image back, from many starts: do they lie together (`embedding_distances`), do they
drive the same units alike (`activation_divergence`), does a localisation method choose the same weights for each
(`overlaps`)? Local memorisation would give small distances, small divergence and overlaps near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import torch
from torch import Tensor

from memscan.mitigation.units import Layout, UnitSet


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

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def embedding_distances(found_NTD: Tensor) -> Spread:
    """Pairwise L2 distances of embeddings, flattened."""
    flat = found_NTD.flatten(1).double()
    return Spread.of([float(torch.linalg.vector_norm(a - b)) for a, b in combinations(flat, 2)])


def activation_divergence(activations_NU: Tensor, layout: Layout) -> dict[str, Spread]:
    """By layer, pairwise cosine distances (1 - cosine, in [0, 2]) of the units' activations."""
    found = {}
    for name, part in zip(layout.names, layout.split(activations_NU.double()), strict=True):
        pairs = [1 - float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(part, 2)]
        found[name] = Spread.of(pairs)
    return found


def overlap(a: UnitSet, b: UnitSet) -> float | None:
    """Intersection over union; None for two empty sets, which have no overlap to speak of."""
    together = len(a | b)
    return (len(a) + len(b) - together) / together if together else None


def overlaps(sets: Sequence[UnitSet]) -> Spread:
    """Pairwise overlaps; pairs of empty sets are counted as `undefined`."""
    return Spread.of([overlap(a, b) for a, b in combinations(sets, 2)])
