"""The seed of a test run decides what the fuzz tests draw."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, is_hypothesis_test, settings
from hypothesis import strategies as st

from tests.support.seeding import VARIABLE, seed_examples


@pytest.mark.parametrize("derandomize", [False, True], ids=["local", "ci"])
def test_a_seed_decides_the_examples(derandomize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(number: str) -> list[int]:
        found: list[int] = []

        @settings(database=None, derandomize=derandomize, max_examples=20)
        @given(st.integers())
        def test(value: int) -> None:
            found.append(value)

        monkeypatch.setenv(VARIABLE, number)
        seed_examples(test)
        test()
        return found

    assert drawn("7") == drawn("7")
    assert drawn("7") != drawn("8")


def test_every_fuzz_test_of_this_session_has_the_seed(request: pytest.FixtureRequest) -> None:
    """By the mark that Hypothesis keeps: what `conftest.py` does to the items reaches them."""
    functions = [item.function for item in request.session.items if isinstance(item, pytest.Function)]
    seeds = {getattr(one, "_hypothesis_internal_use_seed", None) for one in functions if is_hypothesis_test(one)}
    assert seeds <= {int(os.environ[VARIABLE]) if VARIABLE in os.environ else None}
