"""Rates with intervals: how many of how many, and how far the truth may lie from it.

Prompts are counted with the Wilson score interval. Generations of one prompt resemble each other, so a plain interval
over generations is too narrow; `clustered_interval` shrinks their number to the effective one first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with its interval. `rate` is None where there was nothing to count."""

    count: int
    total: int
    rate: float | None
    low: float
    high: float

    def as_dict(self) -> dict[str, float | int | None]:
        return {"count": self.count, "total": self.total, "rate": self.rate, "low": self.low, "high": self.high}


def wilson_interval(count: float, total: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion, in [0, 1]; (0, 1) when `total` is 0.

    Source: Wilson, JASA 22 (1927), equation for the roots in p of (p̂ - p)² = z² p (1 - p) / n.

    Raises:
        ValueError: `count` is not in [0, total].
    """
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is not in [0, {total}]")
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


def rate(count: int, total: int, confidence: float = CONFIDENCE) -> Rate:
    """`count` of `total` with its Wilson interval."""
    low, high = wilson_interval(count, total, confidence)
    return Rate(count, total, count / total if total else None, low, high)


@dataclass(frozen=True)
class ClusterMoments:
    """Sums over clusters (prompts) of sizes n (generations) and hits k, enough for the variance of Σk / Σn."""

    clusters: int
    n: int
    k: int
    nn: int
    kn: int
    kk: int


def effective_size(moments: ClusterMoments) -> float:
    """Number of independent draws that would give the observed variance of the rate; at most n.

    The variance of the ratio Σk / Σn is the usual linearised one with clusters as units (Cochran, Sampling Techniques,
    3rd ed., section 2.11): C / (C - 1) · Σ(k - p n)² / (Σn)². Where all clusters agree it is zero and nothing can be
    said about their spread: then the number of clusters is taken, as if a prompt were one draw.
    """
    if moments.clusters < 2 or moments.n == 0:
        return float(moments.clusters)
    p = moments.k / moments.n
    residuals = moments.kk - 2 * p * moments.kn + p * p * moments.nn
    variance = moments.clusters / (moments.clusters - 1) * max(residuals, 0.0) / moments.n**2
    if p in (0.0, 1.0) or variance <= 0.0:
        return float(moments.clusters)
    return min(float(moments.n), p * (1 - p) / variance)


def clustered_interval(moments: ClusterMoments, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson interval of Σk / Σn at its effective sample size: samples of one prompt count for what they tell."""
    if moments.n == 0:
        return 0.0, 1.0
    size = effective_size(moments)
    return wilson_interval(moments.k / moments.n * size, size, confidence)
