"""Intervals of a screened census: against scipy's own, against enumeration, and their coverage over simulated ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import binom, binomtest, hypergeom

from memscan.census.rates import Screened
from memscan.census.screened import separate_rows
from memscan.config import ScreenConfig
from memscan.detection.decide import Decision, choose_threshold, decide, drawn
from memscan.intervals import clopper_pearson, hypergeometric_interval, lower_limit, upper_limit
from memscan.records import prompt_id

RULE = ScreenConfig(threshold=0.5, audit_share=0.05)


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (1, 5000)])
def test_clopper_pearson_is_scipys(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(method="exact")
    assert clopper_pearson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)
    above = binomtest(count, total, alternative="greater").proportion_ci(0.95, method="exact").low
    below = binomtest(count, total, alternative="less").proportion_ci(0.95, method="exact").high
    assert (lower_limit(count, total), upper_limit(count, total)) == pytest.approx((above, below), abs=1e-9)


def test_one_sided_limits_of_nothing_and_of_wrong_counts() -> None:
    assert (lower_limit(0, 0), upper_limit(0, 0)) == (0.0, 1.0)
    for limit in (lower_limit, upper_limit):
        with pytest.raises(ValueError, match="not in"):
            limit(3, 2)


@pytest.mark.parametrize(("found", "drawn_", "population"), [(0, 5, 40), (2, 10, 40), (10, 10, 40), (7, 40, 40)])
def test_hypergeometric_interval_is_the_enumerated_one(found: int, drawn_: int, population: int) -> None:
    kept = [
        marked
        for marked in range(found, population - drawn_ + found + 1)
        if hypergeom.sf(found - 1, population, marked, drawn_) > 0.025
        and hypergeom.cdf(found, population, marked, drawn_) > 0.025
    ]
    assert hypergeometric_interval(found, drawn_, population) == (kept[0], kept[-1])


def test_what_was_scanned_for_certain_has_no_error() -> None:
    everything = Screened(census=30, below=70, audited=70)
    estimate = everything.estimate(20, 3)
    assert (estimate.total, estimate.low, estimate.high) == (23, 23, 23)
    assert everything.missed(3).high == 0
    blind = Screened(census=30, below=70, audited=0).estimate(20, 0)
    assert (blind.total, blind.low, blind.high) == (None, 20, 90)
    assert blind.share() == {"rate": None, "low": 0.2, "high": 0.9}


@pytest.mark.parametrize("prevalence", [0.0001, 0.001, 0.01, 0.05])
def test_coverage_over_simulated_censuses(prevalence: float) -> None:
    """300 censuses of 20,000 prompts; a screen with recall 0.9 and 3 % false alarms, an audit of 5 %.

    Both intervals are exact or wider, so that at least 95 % must cover: 91 % leaves three standard errors of 300.
    """
    source = np.random.default_rng(11)
    prompts, samples, censuses = 20_000, 4, 300
    covered: Counter[str] = Counter()
    for _ in range(censuses):
        # By stratum (chosen, audited, passed) prompts with 0 to 4 memorised generations: all that is looked at later.
        hits_SH = np.zeros((3, samples + 1), dtype=np.int64)
        memorised = source.binomial(prompts, prevalence)
        for count, hit, take in ((memorised, 0.8, 0.9), (prompts - memorised, 0.0005, 0.03)):
            left = (1 - take) * RULE.audit_share
            for stratum, size in enumerate(source.multinomial(count, (take, left, 1 - take - left))):
                hits_SH[stratum] += source.multinomial(size, binom.pmf(np.arange(samples + 1), samples, hit))
        flagged_S = hits_SH[:, -(-samples // 2) :].sum(axis=1)
        share_S = hits_SH @ np.arange(samples + 1) / samples
        chosen, audited, passed = hits_SH.sum(axis=1).tolist()
        strata = Screened(chosen, audited + passed, audited)
        by_prompt = strata.estimate(int(flagged_S[0]), int(flagged_S[1]))
        covered["prompts"] += bool(by_prompt.low <= flagged_S.sum() <= by_prompt.high)
        by_generation = strata.estimate(float(share_S[0]), float(share_S[1]))
        covered["generations"] += bool(by_generation.low - 1e-9 <= share_S.sum() <= by_generation.high + 1e-9)
        missed = strata.missed(int(flagged_S[1]))
        covered["missed"] += bool(missed.low <= flagged_S[2] <= missed.high)
    assert min(covered.values()) >= 0.91 * censuses, covered


def test_the_audit_draws_its_share_by_hash() -> None:
    ids = [prompt_id(f"caption {number}") for number in range(20_000)]
    chosen = [name for name in ids if drawn(name, 0.05)]
    assert len(chosen) == pytest.approx(1000, abs=4 * (20_000 * 0.05 * 0.95) ** 0.5)
    assert set(chosen) <= {name for name in ids if drawn(name, 0.1)}  # a larger audit repeats a smaller one
    assert {name for name in ids if drawn(name, 0.05, seed=1)} != set(chosen)


def test_decisions_and_their_weights() -> None:
    ids = [prompt_id(f"caption {number}") for number in range(200)]
    assert {(decide(name, 0.5, RULE).decision, decide(name, 0.5, RULE).weight) for name in ids} == {
        (Decision.CENSUS, 1.0)
    }
    below = {(one.decision, one.weight) for one in (decide(name, 0.49, RULE) for name in ids)}
    assert below == {(Decision.AUDIT, 20.0), (Decision.PASS, None)}
    with pytest.raises(ValueError, match="not finite"):
        decide(ids[0], float("nan"), RULE)


def test_a_threshold_keeps_its_recall_with_the_confidence_that_was_asked_for() -> None:
    """Chosen on 2,000 memorised prompts, true recall at least the target in 95 % of 400 trials; 92 % leaves room."""
    source = np.random.default_rng(5)
    from scipy.stats import norm

    kept = 0
    for _ in range(400):
        found = choose_threshold(source.normal(3, 1, 2000).tolist(), target=0.95, margin=0.0)
        assert found.reached
        kept += norm.sf(found.threshold - 3) >= 0.95
    assert kept >= 0.92 * 400


def test_few_memorised_prompts_cannot_show_a_high_recall() -> None:
    found = choose_threshold([3.0, 4.0, 5.0], [0.0, 1.0, 3.5], target=0.99)
    assert not found.reached
    assert found.threshold == pytest.approx(2.8)
    assert found.passed == pytest.approx(2 / 3)
    assert found.recall == 1
    assert found.recall_low == pytest.approx(0.05 ** (1 / 3))
    with pytest.raises(ValueError, match="memorised"):
        choose_threshold([])


def test_input_rows_of_passed_prompts_are_in_no_class() -> None:
    """300 input rows: 20 certain (10 VM), 40 audited (4 BM), 240 passed. Counts and passed add up to all."""
    sums = Counter(
        {
            ("census", "inputs"): 20,
            ("census", "inputs/VM"): 10,
            ("census", "inputs/NM"): 10,
            ("audit", "inputs"): 40,
            ("audit", "inputs/BM"): 4,
            ("audit", "inputs/NM"): 36,
            ("pass", "inputs"): 240,
        }
    )
    rows = {
        "total": 300,
        "classes": {label: {"count": 0, "total": 300, "rate": 0.0} for label in ("VM", "FM", "BM", "NM")},
        "memorised": {"count": 0, "total": 300, "rate": 0.0},
    }
    separate_rows(rows, sums)
    counts = {label: entry["count"] for label, entry in rows["classes"].items()}
    assert counts == {"VM": 10, "FM": 0, "BM": 4, "NM": 46}
    assert sum(counts.values()) + rows["passed"] == rows["total"]
    assert rows["memorised"]["count"] == 14
    # 4 of 40 audited rows stand for 28 of the 280 below the threshold
    assert rows["memorised"]["rate"] == pytest.approx((10 + 28) / 300)
    assert sum(entry["rate"] for entry in rows["classes"].values()) == pytest.approx(1)
    separate_rows(rows, Counter({("census", "inputs"): 20, ("pass", "inputs"): 280}))
    assert rows["memorised"]["rate"] is None  # nothing was audited: nothing can be said
