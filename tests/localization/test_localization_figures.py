"""The figures of the evaluations against sklearn and by hand; maps of the shipped world's model once, end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from memscan.evaluation.detectors import _figures, area_under_curve
from memscan.evaluation.localization import (
    ALL_ONES,
    best_threshold,
    evaluate_localization,
    localization_table,
    mean_iou,
)


def test_area_under_the_curve_is_sklearns(rng: np.random.Generator) -> None:
    positive, negative = rng.integers(3, 9, 50).astype(float), rng.integers(0, 6, 80).astype(float)
    truth = np.r_[np.ones(50), np.zeros(80)]
    expected = roc_auc_score(truth, np.r_[positive, negative])
    assert area_under_curve(positive, negative) == pytest.approx(expected)


def test_scores_that_are_not_numbers_are_counted() -> None:
    scores = np.array([np.nan, 5.0, 1.0, np.inf, 0.0])
    found = _figures(scores, np.array([True, True, False, False, False]))
    assert found == {"nan": 2, "auc": 1.0, "tpr_at_1_fpr": 1.0}


def test_overlap_and_its_best_threshold_by_hand() -> None:
    truth = np.zeros((2, 2, 2), bool)
    truth[:, 0] = True
    values = np.array([[[3.0, 3.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]])
    assert mean_iou(values, truth, 2.0) == pytest.approx((1 + 0.5) / 2)
    assert mean_iou(np.ones_like(values), truth, 1.0) == 0.5
    threshold = best_threshold(values, truth)
    assert 1 < threshold <= 2
    values[1, 0, 0] = np.nan
    assert 1 < best_threshold(values, truth) <= 3


@pytest.mark.slow
def test_maps_of_the_shipped_world() -> None:
    """24 generations; two probes are enough to see that every map is there, finite and better than chance."""
    document = evaluate_localization(probes=2)
    assert document["generations"] == 24
    assert all(row["nan"] == 0 for row in document["maps"].values())
    assert document["maps"][ALL_ONES]["auc"] == 0.5
    for name in ("caption_curvature", "checkpoint_curvature", "score_difference"):
        assert document["maps"][name]["auc"] > 0.5
    assert len(localization_table(document).splitlines()) == 4 + len(document["maps"])
    json.dumps(document)
