"""One bad row never takes its neighbours with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.errors import ModelError, Reason, RowReject, RunError
from memscan.worker.isolation import Isolation

BAD = Reason.GENERATION_FAILED


def double(values: list[int]) -> list[int]:
    if any(value < 0 for value in values):
        raise ValueError("negative")
    return [2 * value for value in values]


@given(st.lists(st.integers(-3, 50), max_size=60))
def test_every_item_keeps_its_place(items: list[int]) -> None:
    results = Isolation(max_failures=1000).batch(items, double, BAD)
    assert len(results) == len(items)
    for item, result in zip(items, results, strict=True):
        if item < 0:
            assert isinstance(result, RowReject)
            assert result.reason is BAD
            assert "negative" in result.message
        else:
            assert result == 2 * item


def test_a_whole_batch_is_one_call() -> None:
    calls: list[int] = []

    def step(values: list[int]) -> list[int]:
        calls.append(len(values))
        return values

    assert Isolation().batch([1, 2, 3], step, BAD) == [1, 2, 3]
    assert calls == [3]


def test_earlier_rejects_pass_and_cost_nothing() -> None:
    reject = RowReject(Reason.CAPTION_EMPTY, "nothing")
    seen: list[int] = []

    def step(values: list[int]) -> list[int]:
        seen.extend(values)
        return values

    assert Isolation().batch([1, reject, 2], step, BAD) == [1, reject, 2]
    assert Isolation().each([1, reject], lambda value: value + 1, BAD) == [2, reject]
    assert seen == [1, 2]


def test_a_reject_that_a_step_raises_keeps_its_own_reason() -> None:
    def step(value: int) -> int:
        raise RowReject(Reason.REFERENCE_MISSING, "gone")

    (result,) = Isolation().each([1], step, BAD)
    assert isinstance(result, RowReject)
    assert result.reason is Reason.REFERENCE_MISSING


def test_a_step_may_return_rejects() -> None:
    reject = RowReject(Reason.GENERATION_NOT_FINITE, "nan")
    assert Isolation().batch([1, 2], lambda values: [reject, 2], BAD) == [reject, 2]


def test_a_step_that_loses_a_row_is_tried_row_by_row() -> None:
    results = Isolation().batch([1, 2, 3], lambda values: values[:1], BAD)
    assert results == [1, 2, 3]


def test_what_the_user_can_act_on_is_no_row() -> None:
    def step(values: list[int]) -> list[int]:
        raise ModelError("weights are gone")

    with pytest.raises(ModelError, match="weights are gone"):
        Isolation().batch([1, 2], step, BAD)


def test_a_worker_in_which_nothing_works_stops() -> None:
    isolation = Isolation(max_failures=5)
    assert len(isolation.batch([-1] * 4, double, BAD)) == 4
    with pytest.raises(RunError, match="5 rows failed one after another"):
        isolation.batch([-1, -1], double, BAD)


def test_one_good_row_shows_that_the_worker_works() -> None:
    isolation = Isolation(max_failures=3)
    for _ in range(10):
        isolation.batch([-1, -1, 1], double, BAD)


def test_rows_that_all_lack_their_reference_stop_the_job() -> None:
    """An index whose images are gone gives no verdict: that is no property of the rows."""

    def gone(value: int) -> int:
        raise RowReject(Reason.REFERENCE_MISSING, "gone")

    def own(value: int) -> int:
        raise RowReject(Reason.IMAGE_UNDECODABLE, "broken")

    isolation = Isolation(max_failures=100)
    assert len(isolation.each(list(range(99)), gone, BAD)) == 99
    assert isolation.each([1], lambda value: value, BAD) == [1]  # one that succeeds begins the count anew
    assert len(isolation.each(list(range(500)), own, BAD)) == 500  # what lies in the rows stops nothing
    with pytest.raises(RunError, match="100 rows failed one after another, the last with reference_missing: gone"):
        isolation.each(list(range(100)), gone, BAD)
    batch = Isolation(max_failures=10)
    with pytest.raises(RunError, match="10 rows failed"):
        batch.batch(list(range(10)), lambda values: [RowReject(Reason.REFERENCE_MISSING, "x") for _ in values], BAD)
