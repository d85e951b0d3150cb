"""Scoring against truth, computed by hand and against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from memscan.planted.score import Found, score_prompts
from memscan.records import Label


def _truth(label: str, number: int, references: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"prompt_id": f"{label}{number}", "label": label, "reference_ids": list(references)}


def test_perfect_census() -> None:
    truth = [
        _truth(label, i, (f"{label}{i}",) if label != "NM" else ())
        for label in ("VM", "FM", "BM", "NM")
        for i in range(3)
    ]
    found = {row["prompt_id"]: Found(Label(row["label"]), tuple(row["reference_ids"])) for row in truth}
    result = score_prompts(truth, found)
    assert (result["accuracy"], result["macro_f1"], result["false_positive_rate"]) == (1.0, 1.0, 0.0)
    assert (result["match_precision"], result["match_recall"], result["missing"]) == (1.0, 1.0, 0)


def test_wrong_matches_and_missing_prompts_count() -> None:
    truth = [_truth("VM", 0, ("a", "b")), _truth("FM", 0, ("c",)), _truth("NM", 0), _truth("NM", 1)]
    found = {"VM0": Found(Label.VM, ("a", "x")), "NM0": Found(Label.BM, ("y",)), "NM1": Found(Label.NM, ())}
    result = score_prompts(truth, found)
    assert result["missing"] == 1
    assert result["false_positive_rate"] == 0.5
    assert result["match_precision"] == pytest.approx(1 / 3)
    assert result["match_recall"] == 0.5


def test_nothing_flagged_has_no_precision() -> None:
    assert score_prompts([_truth("NM", 0)], {})["match_precision"] is None


def test_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    names = [label.value for label in Label]
    expected, predicted = rng.choice(names, 200), rng.choice(names, 200)
    truth = [{"prompt_id": str(i), "label": label, "reference_ids": ["r"]} for i, label in enumerate(expected)]
    found = {str(i): Found(Label(label), ("r",)) for i, label in enumerate(predicted)}
    result = score_prompts(truth, found)
    assert result["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert result["accuracy"] == pytest.approx(accuracy_score(expected, predicted))
