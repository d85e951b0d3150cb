"""This module has intervals of proportions: Wilson's, Clopper and Pearson's exact one, and the hypergeometric one.

It does not need torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv
from scipy.stats import hypergeom

CONFIDENCE = 0.95


def wilson_interval(count: float, total: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the Wilson score interval of a binomial proportion, in [0, 1]; (0, 1) when `total` is 0.

    Source: Wilson, JASA 22 (1927), equation for the roots in p of (p̂ - p)² = z² p (1 - p) / n.

    Raises:
        ValueError: `count` is not in [0, total].
    """
    _check(count, total)
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = count / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if count == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if count == total else min(1.0, (centre + spread) / scale)
    return low, high


def clopper_pearson(count: float, total: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact two-sided binomial interval, in [0, 1]; (0, 1) when `total` is 0.

    Source: Clopper and Pearson, Biometrika 26 (1934). `count` may be a sum of values in [0, 1], which spreads less than
    yes and no at the same mean: the interval is then wider than need be, not narrower.

    Raises:
        ValueError: `count` is not in [0, total].
    """
    each = (1 + confidence) / 2
    return lower_limit(count, total, each), upper_limit(count, total, each)


def lower_limit(count: float, total: float, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower Clopper-Pearson limit, in [0, 1]; 0 when `total` is 0.

    Raises ValueError as `clopper_pearson` does.
    """
    _check(count, total)
    return float(betaincinv(count, total - count + 1, 1 - confidence)) if count else 0.0


def upper_limit(count: float, total: float, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided upper Clopper-Pearson limit, in [0, 1]; 1 when `total` is 0.

    Raises ValueError as `clopper_pearson` does.
    """
    _check(count, total)
    return float(upper_limits(np.asarray(count), total, confidence))


def upper_limits(counts: npt.NDArray[np.number], total: float, confidence: float) -> npt.NDArray[np.float64]:
    """Return the `upper_limit` of many counts of one total, in the shape of `counts`, which must lie in [0, total]."""
    # A count of all has the limit 1, where the distribution has no second parameter. The quantile of the beta
    # distribution itself: scipy.stats gives the same number after 40 times the work on a scalar.
    limit = betaincinv(counts + 1, np.where(counts < total, total - counts, 1), confidence)
    return np.asarray(np.where(counts < total, limit, 1.0), dtype=np.float64)


@lru_cache(maxsize=256)  # a census asks for the estimate and for what was missed: milliseconds each
def hypergeometric_interval(found: int, drawn: int, population: int, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """Return an interval of the number of marked items in a finite population.

    `found` of `drawn` items are marked. The interval holds the counts that neither tail of the
    hypergeometric distribution rejects (Cochran, Sampling Techniques, section 3.6), so it is exact.

    Raises:
        ValueError: the numbers do not nest.
    """
    if not 0 <= found <= drawn <= population:
        raise ValueError(f"{found} of {drawn} of {population} do not nest")
    tail = (1 - confidence) / 2
    low, high = found, population - (drawn - found)
    # P(X >= found) grows with the marked and P(X <= found) falls: two bisections.
    smallest = _first(low, high, lambda marked: hypergeom.sf(found - 1, population, marked, drawn) > tail)
    largest = _first(low, high, lambda marked: hypergeom.cdf(found, population, marked, drawn) <= tail)
    exceeds = bool(hypergeom.cdf(found, population, largest, drawn) <= tail)
    return smallest, largest - 1 if exceeds else largest


def _check(count: float, total: float) -> None:
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is not in [0, {total}]")


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest number in [low, high] for which a monotone condition holds; `high` where none does."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
