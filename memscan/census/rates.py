"""This module computes rates with intervals, which say how far the true rate may be from the counted one.

Prompts are counted with the Wilson score interval. Generations of one prompt resemble each other, so a plain interval
over generations is too narrow; `clustered_interval` shrinks their number to the effective one first.
"""

from __future__ import annotations

from dataclasses import dataclass

from memscan.intervals import CONFIDENCE, clopper_pearson, hypergeometric_interval, wilson_interval


@dataclass(frozen=True)
class Rate:
    """A rate is `count` of `total`, with its interval. `rate` is None if there was nothing to count."""

    count: int
    total: int
    rate: float | None
    low: float
    high: float

    def as_dict(self) -> dict[str, float | int | None]:
        return {"count": self.count, "total": self.total, "rate": self.rate, "low": self.low, "high": self.high}


def rate(count: int, total: int, confidence: float = CONFIDENCE) -> Rate:
    """Return the rate `count` of `total` with its Wilson interval."""
    low, high = wilson_interval(count, total, confidence)
    return Rate(count, total, count / total if total else None, low, high)


@dataclass(frozen=True)
class ClusterMoments:
    """These are sums over clusters (prompts) of sizes n (generations) and hits k, from which the variance follows."""

    clusters: int
    n: int
    k: int
    nn: int
    kn: int
    kk: int


def effective_size(moments: ClusterMoments) -> float:
    """Return the number of independent draws that would give the observed variance of the rate, at most n.

    The variance of the ratio Σk / Σn is the usual linearised one with clusters as units (Cochran, Sampling Techniques,
    3rd ed., section 2.11): C / (C - 1) · Σ(k - p n)² / (Σn)². If all clusters agree, it is zero, and nothing is
    known about their spread. Then the number of clusters is returned, as if each prompt were one draw.
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
    """Return the Wilson interval of Σk / Σn at its effective sample size.

    Samples of one prompt resemble each other, so this size is at most their number, and usually smaller.
    """
    if moments.n == 0:
        return 0.0, 1.0
    size = effective_size(moments)
    return wilson_interval(moments.k / moments.n * size, size, confidence)


@dataclass(frozen=True)
class Screened:
    """These are the prompts of a screened census: scanned in any case, below the threshold, and audited."""

    census: int
    below: int
    audited: int

    @property
    def prompts(self) -> int:
        return self.census + self.below

    def estimate(self, census: float, audit: float, confidence: float = CONFIDENCE) -> Estimate:
        """Estimate the total over all prompts of a value in [0, 1] per prompt, from its sums over the scanned prompts.

        This is the stratified form of the Horvitz-Thompson estimator (Cochran, section 5.3). The weight of the audited
        prompts makes them represent the known number of prompts below the threshold. Prompts that are scanned in any
        case have no sampling error. For integer sums the interval is the hypergeometric one, and otherwise that of
        Clopper and Pearson. Without audited prompts there is no estimate, and the interval holds every possible total.
        """
        total = None if self.below and not self.audited else census + _ratio(audit * self.below, self.audited)
        if float(audit).is_integer():
            low, high = hypergeometric_interval(int(audit), self.audited, self.below, confidence)
            return Estimate(total, census + low, census + high, self.prompts)
        shares = clopper_pearson(audit, self.audited, confidence)
        low_sum, high_sum = (share * self.below for share in shares)
        rest = self.below - self.audited  # what was seen is certain
        return Estimate(total, census + max(audit, low_sum), census + min(audit + rest, high_sum), self.prompts)

    def missed(self, audit: int, confidence: float = CONFIDENCE) -> Estimate:
        """Estimate how many memorised prompts were passed, from the memorised ones among the audited."""
        found = self.estimate(0, audit, confidence)
        count = None if found.total is None else found.total - audit
        return Estimate(count, found.low - audit, found.high - audit, self.below - self.audited)


@dataclass(frozen=True)
class Estimate:
    """An estimate is a total over prompts with its interval, out of `of`; `total` is None if there is no estimate."""

    total: float | None
    low: float
    high: float
    of: int

    def share(self) -> dict[str, float | None]:
        """Return the estimate as a rate with its interval; the interval is (0, 1) if there are no prompts."""
        if not self.of:
            return {"rate": None, "low": 0.0, "high": 1.0}
        rate = None if self.total is None else self.total / self.of
        return {"rate": rate, "low": self.low / self.of, "high": self.high / self.of}


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0
