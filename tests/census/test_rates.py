"""Intervals against scipy and against the textbook's estimators written out over clusters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from memscan.census.rates import ClusterMoments, clustered_interval, effective_size, rate
from memscan.intervals import wilson_interval


@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_equals_scipy(pair: tuple[int, int]) -> None:
    count, total = pair
    expected = binomtest(count, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_closed_form() -> None:
    # 0 of n: the upper end is z² / (n + z²).
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 100) == (0.0, pytest.approx(z2 / (100 + z2), rel=1e-12))
    assert wilson_interval(100, 100) == (pytest.approx(100 / (100 + z2), rel=1e-12), 1.0)


def test_nothing_to_count_says_nothing() -> None:
    nothing = rate(0, 0)
    assert (nothing.rate, nothing.low, nothing.high) == (None, 0.0, 1.0)


@pytest.mark.parametrize(("count", "total"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="not in"):
        wilson_interval(count, total)


def moments(hits: np.ndarray, sizes: np.ndarray) -> ClusterMoments:
    values = (sizes, hits, sizes**2, hits * sizes, hits**2)
    return ClusterMoments(len(sizes), *(int(value.sum()) for value in values))


@pytest.mark.parametrize("seed", range(5))
def test_effective_size_is_the_linearised_variance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 400)
    hits = rng.binomial(sizes, rng.beta(0.2, 0.8, 400))
    p = hits.sum() / sizes.sum()
    variance = len(sizes) / (len(sizes) - 1) * np.sum((hits - p * sizes) ** 2) / sizes.sum() ** 2
    assert effective_size(moments(hits, sizes)) == pytest.approx(p * (1 - p) / variance, rel=1e-9)


def test_identical_generations_count_as_one_prompt_each() -> None:
    hits = np.array([4] * 30 + [0] * 70)
    size = effective_size(moments(hits, np.full(100, 4)))
    assert size == pytest.approx(99)  # C - 1: the variance is estimated
    low, high = clustered_interval(moments(hits, np.full(100, 4)))
    plain_low, plain_high = wilson_interval(120, 400)
    assert low < plain_low < 0.3 < plain_high < high


def test_independent_generations_keep_their_number() -> None:
    rng = np.random.default_rng(1)
    hits = rng.binomial(4, 0.3, 5000)
    assert effective_size(moments(hits, np.full(5000, 4))) == pytest.approx(20_000, rel=0.1)


def test_clustered_interval_covers() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        hits = rng.binomial(4, rng.beta(0.1, 0.9, 300))
        low, high = clustered_interval(moments(hits, np.full(300, 4)))
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize("hits", [[0, 0, 0], [2, 2, 2]])
def test_unanimous_clusters_count_as_clusters(hits: list[int]) -> None:
    assert effective_size(moments(np.array(hits), np.full(3, 2))) == 3


def test_no_generations() -> None:
    assert clustered_interval(ClusterMoments(0, 0, 0, 0, 0, 0)) == (0.0, 1.0)
