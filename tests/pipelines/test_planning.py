"""The planner against closed forms, and against what must hold of any pipeline."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscan.errors import ConfigError
from memscan.planning import Failures, Job, Stage, bottleneck, coarser, estimate, simulate, simulate_many, split

ONE = Job(1000, 10, (Stage("census", 2.0, gpus=1),), startup=30, bytes_per_prompt=100)
TWO = Job(1000, 10, (Stage("sample", 1.0, gpus=1), Stage("judge", 4.0)), startup=30, bytes_per_prompt=100)


@given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 12), st.floats(0.1, 20))
@settings(max_examples=60, deadline=None)
def test_one_stage_without_failures_is_the_closed_form(blocks: int, block: int, workers: int, rate: float) -> None:
    job = Job(blocks * block, block, (Stage("census", rate),), startup=7, bytes_per_prompt=1)
    exact = 7 + math.ceil(blocks / workers) * block / rate
    assert simulate(job, [workers]).seconds == pytest.approx(exact)
    assert estimate(job, [workers]).seconds == pytest.approx(exact)


@pytest.mark.parametrize(("workers", "limit"), [((4, 1), None), ((1, 1), "sample"), ((8, 1), "judge")])
def test_two_stages_go_at_the_pace_of_the_slower(workers: tuple[int, int], limit: str | None) -> None:
    outcome = simulate(TWO, workers)
    pace = min(workers[0] * 1.0, workers[1] * 4.0)
    least = 30 + 1000 / pace
    # Above it only by the filling and the emptying of the pipeline: a block of each stage.
    assert least < outcome.seconds <= least + 10 / 1.0 + 10 / 4.0 + 1e-6
    if limit:
        assert bottleneck(TWO, workers) == limit
        assert outcome.busy[limit] == max(outcome.busy.values())


def test_the_best_split_is_found() -> None:
    assert split(TWO, 10) == (8, 2)
    with pytest.raises(ConfigError):
        split(ONE, 10)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_losses_never_lose_a_block_and_only_cost_time(seed: int) -> None:
    plain, hit = simulate(TWO, (4, 2)), simulate(TWO, (4, 2), Failures(hours=0.05, away=20), seed)
    assert hit.seconds >= plain.seconds - 1e-6
    assert hit.redone <= hit.lost
    assert all(0 <= share <= 1 + 1e-9 for share in hit.busy.values())


def test_a_worker_that_is_lost_now_and_then_is_away_for_as_long_as_renewal_theory_says() -> None:
    """Availability of a machine with mean time between failures M that is away for A seconds: M / (M + A)."""
    job = Job(200_000, 1, (Stage("census", 1.0),), startup=0, bytes_per_prompt=1)
    mean, late = simulate_many(job, [20], Failures(hours=0.5, away=600), runs=12)
    available = 1800 / (1800 + 600)
    assert mean.seconds == pytest.approx(10_000 / available, rel=0.025)  # 1,300 losses in all: 3 sigma are .02
    assert late >= mean.seconds * 0.97


def test_a_slow_writer_is_the_bottleneck() -> None:
    job = Job(1000, 10, ONE.stages, 0, 1, writes=5)
    assert bottleneck(job, [100]) == "write"
    assert simulate(job, [100]).seconds >= 1000 / 5


def test_coarser_blocks_are_for_large_jobs_only() -> None:
    assert coarser(ONE, [4]) is ONE
    large = Job(5_000_000, 16, ONE.stages, 30, 1)
    assert coarser(large, [64]).blocks <= 10_000


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate of census"):
        Job(10, 1, (Stage("census", rate),), 0, 1)
