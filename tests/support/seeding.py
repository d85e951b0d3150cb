"""MEMSCAN_TEST_SEED for the tests that draw their examples by Hypothesis: other examples for another seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import is_hypothesis_test, seed

VARIABLE = "MEMSCAN_TEST_SEED"


def seed_examples(test: Callable[..., Any]) -> None:
    """Draw the examples of a test by the seed, where one is set and the test draws any."""
    if VARIABLE in os.environ and is_hypothesis_test(test):
        seed(int(os.environ[VARIABLE]))(test)
