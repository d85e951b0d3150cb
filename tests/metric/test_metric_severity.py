"""Harm of labels and the score of a mitigation."""

from __future__ import annotations

import pytest

from memscan.metric import harm, mean_harm, mitigation_score
from memscan.records import Label


def test_harm_of_each_label() -> None:
    assert [harm(label) for label in Label] == [2.0, 1.5, 0.5, 0.0]
    assert harm("FM") == 1.5
    with pytest.raises(ValueError, match="XM"):
        harm("XM")


def test_mean_harm() -> None:
    assert mean_harm(["VM", "NM", "BM", "FM"]) == 1.0
    with pytest.raises(ValueError, match="no labels"):
        mean_harm([])


def test_mitigation_score_sums_what_was_removed() -> None:
    before, after = ["VM", "FM", "BM", "NM"], ["NM", "BM", "BM", "VM"]
    assert mitigation_score(before, after) == pytest.approx(2 + 1 + 0 - 2)
    assert mitigation_score(before, after, normalise=True) == pytest.approx(1 / 4)
    assert mitigation_score(before, ["NM"] * 4, normalise=True) == 1.0


def test_mitigation_score_needs_corresponding_generations() -> None:
    with pytest.raises(ValueError, match="correspond"):
        mitigation_score(["VM"], [])
    with pytest.raises(ValueError, match="not defined"):
        mitigation_score(["NM"], ["NM"], normalise=True)
