"""The figures of the evaluations against sklearn and by hand; maps of the shipped world's model once, end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from memscan.config import GeneratorConfig
from memscan.errors import ConfigError, InputError, ModelError
from memscan.evaluation.detectors import _figures, area_under_curve, evaluate_detectors
from memscan.evaluation.localization import (
    AGREEMENT,
    ALL_ONES,
    best_threshold,
    evaluate_localization,
    evaluate_maps,
    false_alarms,
    localization_table,
    mean_iou,
)
from memscan.evaluation.localization import (
    _figures as _map_figures,
)
from memscan.evaluation.subjects import masked_subject, planted_regions, planted_subject
from memscan.localization.seed_agreement import seed_agreement
from memscan.planted.world import read_truth, world_folder


def test_area_under_the_curve_is_sklearns(rng: np.random.Generator) -> None:
    positive, negative = rng.integers(3, 9, 50).astype(float), rng.integers(0, 6, 80).astype(float)
    truth = np.r_[np.ones(50), np.zeros(80)]
    expected = roc_auc_score(truth, np.r_[positive, negative])
    assert area_under_curve(positive, negative) == pytest.approx(expected)


def test_scores_that_are_not_numbers_are_counted() -> None:
    scores = np.array([np.nan, 5.0, 1.0, np.inf, 0.0])
    found = _figures(scores, np.array([True, True, False, False, False]))
    assert found == {"nan": 2, "auc": 1.0, "tpr_at_1_fpr": 1.0}


def test_what_is_never_a_number_is_counted_and_ranks_nothing() -> None:
    """A detector or map that fails everywhere is a row without figures, not a crash, and JSON stays JSON."""
    truth = np.array([True, False])
    assert _figures(np.full(2, np.nan), truth) == {"nan": 2, "auc": None, "tpr_at_1_fpr": None}
    maps, region = np.full((2, 2, 2), np.nan), np.ones((2, 2, 2), bool)
    assert _map_figures(maps, region) == {"auc": None, "iou_oracle": None}
    assert mean_iou(np.ones((2, 2, 2)), region, best_threshold(maps, region)) == 0


@pytest.mark.parametrize("evaluate", [evaluate_detectors, evaluate_localization])
def test_thresholds_are_not_chosen_on_the_world_that_is_reported_on(evaluate: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose thresholds on another one"):
        evaluate(None, world_folder(None))
    with pytest.raises(ModelError, match="no planted world here"):
        evaluate(None, tmp_path)


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


def test_planted_regions_are_those_that_a_groups_images_share() -> None:
    """By another way: FM is the first image's mask; a BM cell is one that most of the group's objects leave free."""
    rows = [row for row in read_truth().to_pylist() if row["label"] in ("FM", "BM")]
    regions = planted_regions(None, rows, (8, 8))
    table = pq.read_table(world_folder(None) / "references.parquet", columns=["reference_id", "mask"]).to_pylist()
    masks = {row["reference_id"]: row["mask"] for row in table}
    for label in ("FM", "BM"):
        at = next(number for number, row in enumerate(rows) if row["label"] == label)
        shares = []
        for name in rows[at]["reference_ids"]:
            mask = np.asarray(Image.open(io.BytesIO(masks[name])), np.float64) / 255
            shares.append(mask.reshape(8, 8, 8, 8).mean(axis=(1, 3)))
        if label == "FM":
            assert np.ptp(shares, axis=0).max() == 0  # one object in one place
            np.testing.assert_array_equal(regions[at], shares[0] >= 0.5)
        else:
            assert np.ptp(shares, axis=0).max() > 0.5
            np.testing.assert_array_equal(regions[at], np.mean(shares, axis=0) <= 0.5)


def test_agreement_is_the_share_of_pixels_that_the_generations_share() -> None:
    images = np.full((3, 8, 8, 3), 100, np.uint8)
    images[1, :, 4:] = 160  # standard deviation sqrt(2) / 3 * 60 = 28.3 levels
    images[1, :4, 2] = 130  # 14.1: within the tolerance
    agreement = seed_agreement(images, (2, 2))
    np.testing.assert_array_equal(agreement, [[1, 0], [1, 0]])
    np.testing.assert_array_equal(seed_agreement(images, (2, 2), tolerance=10), [[0.75, 0], [1, 0]])
    with pytest.raises(ValueError, match="two generations"):
        seed_agreement(images[:1], (2, 2))


def test_false_alarms_by_hand() -> None:
    values = np.array([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[np.nan, 9.0], [9.0, 9.0]]])
    assert false_alarms(values, 2.0) == {"false_alarms": 1, "false_area": pytest.approx(1 / 12)}
    assert false_alarms(values[:0], 2.0) == {}


def test_a_persons_own_masks(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    table = tmp_path / "masks.csv"
    table.write_text("caption,mask\na red boat,\na  small house ,m.png\n")
    subject = masked_subject(GeneratorConfig(path="g"), str(table))
    assert (subject.captions, subject.memorised, subject.earlier) == (("a small house", "a red boat"), 1, None)
    np.testing.assert_array_equal(subject.regions((2, 2)), [[[True, False], [True, False]]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption\na\n", "has no column mask"),
        ("", "holds no prompts"),
        ("caption,mask\na,\n", "no caption has a mask"),
        ("caption,mask\n ,m.png\n", "row 1 has no caption"),
        ("caption,mask\na,none.png\n", "cannot be read"),
        ("caption,mask\na,black.png\n", "marks nothing"),
        ("caption,mask\na,masks.csv\n", "is not a mask"),
    ],
)
def test_masks_that_cannot_be_used_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "black.png")
    table = tmp_path / "masks.csv"
    table.write_text(text)
    with pytest.raises(InputError, match=message):
        masked_subject(GeneratorConfig(path="g"), str(table))


@pytest.mark.long
def test_maps_of_the_shipped_world() -> None:
    """24 prompts, two generations, one probe: every map is there and finite, and the order of the findings holds.

    The full evaluation (docs/detection.md) has four generations and sixteen probes.
    """
    document = evaluate_maps(planted_subject(None, most_ordinary=4), probes=1, seeds=2, points=2)
    assert (document["prompts"], document["ordinary"]) == (24, 4)
    alarms = {one["false_alarms"] for one in document["maps"][ALL_ONES]["settings"]}
    assert alarms == {4}  # what marks everything marks prompts that are not memorised
    assert all(row["nan"] == 0 for row in document["maps"].values())
    assert {one["auc"] for one in document["maps"][ALL_ONES]["settings"]} == {0.5}
    figures = {
        name: {(one["timestep"], one["generations"], one["relative"]): one["auc"] for one in row["settings"]}
        for name, row in document["maps"].items()
    }
    first, last = (one["timestep"] for one in document["maps"][ALL_ONES]["settings"][:: len(figures[ALL_ONES]) - 1])
    assert figures["score_difference"][first, 2, True] > 0.9 > figures["score_difference"][last, 1, False]
    assert figures[AGREEMENT][None, 2, False] > 0.85
    assert figures["caption_curvature"][last, 1, False] > 0.5
    assert len(localization_table(document).splitlines()) == 4 + len(document["maps"])
    json.dumps(document)
