"""The planner against closed forms, and against what must hold of any pipeline."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscan.errors import ConfigError
from memscan.planning import Failures, Job, Stage, bottleneck, deal, estimate, simulate, simulate_many, split

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


@given(st.integers(1, 5_000_000), st.integers(1, 64), st.integers(1, 256))
@settings(max_examples=40, deadline=None)
def test_every_prompt_is_dealt_out_once_in_whole_blocks(prompts: int, block: int, workers: int) -> None:
    job = Job(prompts, block, ONE.stages, 30, 1)
    sizes = deal(job, [workers])
    assert sum(sizes) == prompts
    assert all(size % block == 0 for size in sizes[:-1])
    assert (len(sizes) == job.blocks) if job.blocks <= 10_000 else (len(sizes) < 10_000 + 40 * workers * 20)


@pytest.mark.parametrize("hours", [math.inf, 1.0, 0.2])
def test_dealing_out_runs_of_blocks_changes_little(hours: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost worker loses a block and not its run: the same job simulated block by block takes as long."""
    job = Job(64_000, 16, TWO.stages, 60, 1)
    runs = Failures(hours, 120)
    single, _ = simulate_many(job, [16, 5], runs, 16)
    monkeypatch.setattr("memscan.planning.SINGLE_BLOCKS", 100)
    dealt, _ = simulate_many(job, [16, 5], runs, 16)
    # At .2 h 16 runs have some 2,000 losses, which cost a fifth of the time: the difference has a sigma of .6 %.
    assert dealt.seconds == pytest.approx(single.seconds, rel=0.02)
    assert dealt.redone <= dealt.lost


def test_a_job_with_very_many_losses_is_simulated_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    job, often = Job(100_000, 16, ONE.stages, 60, 1), Failures(0.1, 30)
    whole, _ = simulate_many(job, [16], often, 4)
    monkeypatch.setattr("memscan.planning.MOST_LOSSES", 20)
    part, _ = simulate_many(job, [16], often, 20)
    assert part.seconds == pytest.approx(whole.seconds, rel=0.03)
    assert part.lost == pytest.approx(whole.lost, rel=0.15)


def test_workers_that_never_finish_a_block_are_refused() -> None:
    with pytest.raises(ConfigError, match="a block takes census 5 s, and a worker is lost every 0 s"):
        simulate(ONE, [4], Failures(hours=0.0001))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate of census"):
        Job(10, 1, (Stage("census", rate),), 0, 1)
