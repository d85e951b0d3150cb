"""This module tests whether the memorisation of one image is in one place, by three analyses of "Finding DoRI" (2025).

Several embeddings, found from many starting points, bring one image back. The analyses ask whether they are close to
each other (`embedding_distance`), whether they drive the same units (`activation_distances`), and whether a
localisation method chooses the same units or weights for each (`overlap`, `weight_overlap`). `analyses` answers all
three questions. Pairs of one image are compared with pairs of different images (`Comparison`), because they say little
alone. Local memorisation would give small distances and overlaps near 1 within an image, but not between images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from memscan.mitigation.units import Layout, UnitSet

T = TypeVar("T")
ENOUGH = 4  # images below which drawing them anew says nothing


@dataclass(frozen=True)
class Spread:
    """This holds mean, smallest and largest of pairwise values.

    `pairs` is the number of values, and `undefined` counts pairs without a value.
    """

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
    """This holds values of pairs that belong to one image, and of pairs that belong to different images.

    Attributes:
        difference: mean within less mean between, each image and each pair of images weighing the same; None where
            either has no value.
        low, high: its 95 % interval, from drawing images, not pairs, with replacement; None for fewer than four images.
    """

    within: Spread
    between: Spread
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[T]], value: Callable[[T, T], float | None], resamples: int = 2000, seed: int = 0
    ) -> Comparison:
        """Compute a value for every pair.

        Args:
            groups: what was found for each image.
        """
        within = [[value(a, b) for a, b in combinations(group, 2)] for group in groups]
        between = {
            (i, j): [value(a, b) for a in groups[i] for b in groups[j]] for i, j in combinations(range(len(groups)), 2)
        }
        own_G = np.array([_mean(values) for values in within])
        other_GG = np.full((len(groups), len(groups)), np.nan)
        for (i, j), values in between.items():
            other_GG[i, j] = other_GG[j, i] = _mean(values)
        drawn = np.random.default_rng(seed).integers(0, max(1, len(groups)), (resamples, len(groups)))
        differences = [_difference(own_G, other_GG, rows) for rows in (np.arange(len(groups)), *drawn)]
        known = [one for one in differences[1:] if np.isfinite(one)]
        enough = known and len(groups) >= ENOUGH
        low, high = np.quantile(known, (0.025, 0.975)) if enough else (None, None)
        flat = [one for values in within for one in values], [one for values in between.values() for one in values]
        if not np.isfinite(differences[0]):
            return cls(Spread.of(flat[0]), Spread.of(flat[1]))
        return cls(Spread.of(flat[0]), Spread.of(flat[1]), differences[0], _number(low), _number(high))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _difference(own_G: Any, other_GG: Any, rows: Any) -> float:
    """Mean within less mean between over images drawn; a pair of an image with itself is none (NaN in `other_GG`)."""
    within, between = own_G[rows], other_GG[np.ix_(rows, rows)]
    if np.isnan(within).all() or np.isnan(between).all():
        return float("nan")
    return float(np.nanmean(within) - np.nanmean(between))


@dataclass(frozen=True)
class Located:
    """This is an embedding that brings an image back, with the units and weights that localisation finds for it.

    Attributes:
        activations_U: of the value units.
        units: NeMo's choice.
        weights: Wanda's, as `positions` gives them.
    """

    embedding_TD: Tensor
    activations_U: Tensor
    units: UnitSet
    weights: Mapping[str, Tensor]


def analyses(
    starts: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Located]], layout: Layout
) -> dict[str, dict[str, Any]]:
    """Return the three analyses, within an image and between images.

    Args:
        starts: where every search of each image began.
        found: what the searches of each image found, those that bring it back.

    Returns:
        "embeddings" -> "starts" and "found" (L2 distances), "activations" -> layer (1 - cosine), "overlap" -> "nemo"
        and "wanda" (intersection over union); each a `Comparison` as JSON. "chosen" -> smallest, median and largest
        number of units and weights that one embedding selects.
    """
    units = [[one.units for one in group] for group in found]
    weights = [[one.weights for one in group] for group in found]
    by_layer = activation_distances([[one.activations_U for one in group] for group in found], layout)
    return {
        "embeddings": {
            "starts": Comparison.of(starts, embedding_distance).as_dict(),
            "found": Comparison.of(
                [[one.embedding_TD for one in group] for group in found], embedding_distance
            ).as_dict(),
        },
        "activations": {name: one.as_dict() for name, one in by_layer.items()},
        "overlap": {
            "nemo": Comparison.of(units, overlap).as_dict(),
            "wanda": Comparison.of(weights, weight_overlap).as_dict(),
        },
        "chosen": {
            "nemo": _sizes([len(one) for group in units for one in group]),
            "wanda": _sizes([sum(map(len, one.values())) for group in weights for one in group]),
        },
    }


def _sizes(counts: Sequence[int]) -> dict[str, float | int | None]:
    if not counts:
        return {"low": None, "median": None, "high": None}
    return {"low": min(counts), "median": median(counts), "high": max(counts)}


def embedding_distance(a_TD: Tensor, b_TD: Tensor) -> float:
    """Return the L2 distance of two embeddings, flattened."""
    return float(torch.linalg.vector_norm(a_TD.double() - b_TD.double()))


def activation_distance(a_U: Tensor, b_U: Tensor) -> float:
    """Return 1 - cosine of two activations, in [0, 2]."""
    return 1 - float(torch.cosine_similarity(a_U.double(), b_U.double(), dim=0))


def activation_distances(groups: Sequence[Sequence[Tensor]], layout: Layout) -> dict[str, Comparison]:
    """Return, by layer, the distances of the units' activations, which are (units,) each."""
    split = [[layout.split(one_U) for one_U in group] for group in groups]
    return {
        name: Comparison.of([[parts[at] for parts in group] for group in split], activation_distance)
        for at, name in enumerate(layout.names)
    }


def overlap(a: UnitSet, b: UnitSet) -> float | None:
    """Return the intersection over union; None for two empty sets, which have no overlap."""
    together = len(a | b)
    return (len(a) + len(b) - together) / together if together else None


def positions(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the flat positions (int64, ascending) of the chosen weights, from boolean masks by parameter name.

    The mask of a large model is hundreds of times as long as this list.
    """
    return {name: mask.flatten().nonzero().flatten() for name, mask in masks.items()}


def weight_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float | None:
    """Return the intersection over union of chosen weights, as `positions` gives them. A name that is missing has none.

    The result is None for two empty choices.
    """
    common = sum(int(torch.isin(a[name], b[name], assume_unique=True).sum()) for name in a.keys() & b.keys())
    together = sum(len(one) for chosen in (a, b) for one in chosen.values()) - common
    return common / together if together else None
