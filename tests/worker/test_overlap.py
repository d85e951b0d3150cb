"""Sampling and judging at once: the same results in the same order, bounded in memory, errors passed on."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.worker.overlap import chunks_of, flat, overlapped


@given(st.lists(st.integers(), max_size=30), st.integers(1, 7))
def test_equals_one_half_after_the_other(items: list[int], size: int) -> None:
    chunks = chunks_of(items, size)
    made = overlapped(chunks, lambda chunk: [item + 1 for item in chunk], lambda chunk: [2 * item for item in chunk])
    assert list(flat(made)) == [2 * (item + 1) for item in items]


def test_a_chunk_is_sampled_while_the_one_before_is_judged() -> None:
    second_sampled = threading.Event()

    def sample(chunk: int) -> int:
        if chunk == 1:
            second_sampled.set()
        return chunk

    def judge(chunk: int) -> bool:
        return second_sampled.wait(60)

    assert overlapped([0, 1], sample, judge) == [True, True]


def test_at_most_one_chunk_waits() -> None:
    judged: list[int] = []
    ahead: list[int] = []

    def sample(chunk: int) -> int:
        ahead.append(chunk - len(judged))
        return chunk

    overlapped(list(range(8)), sample, judged.append)
    assert max(ahead) <= 2


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("half", ["sample", "judge"])
def test_what_a_half_raises_is_raised(half: str, at: int) -> None:
    def work(name: str, chunk: int) -> int:
        if name == half and chunk == at:
            raise RuntimeError(f"{half} {at}")
        return chunk

    with pytest.raises(RuntimeError, match=f"{half} {at}"):
        overlapped([0, 1, 2], lambda chunk: work("sample", chunk), lambda chunk: work("judge", chunk))
