"""The evaluation set is what it says, and the variants do on it what docs/metric.md says, in a smaller form."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from memscan.config import MetricConfig
from memscan.errors import MemscanError
from memscan.evaluation import variants
from memscan.evaluation.corruptions import CORRUPTIONS
from memscan.evaluation.pairs import draw_pairs, draw_traps
from memscan.evaluation.photographs import HALVES, draw_photograph_pairs, draw_photograph_traps, installed
from memscan.evaluation.tables import metric_tables
from memscan.evaluation.variants import AREA_BINS, evaluate_metric, score_pairs
from memscan.metric.variants import load_metric
from memscan.records import Label

AREA = (0.03, 0.05)
FEW = ("shift 8 px", "scale 10 %", "hue 180°", "jpeg 30", "occlusion 30 %")


def test_pairs_share_what_their_label_says() -> None:
    for pair in draw_pairs(11, 3):
        inside = pair.generated.mask_HW == 1
        outside = (pair.generated.mask_HW == 0) & (pair.reference.mask_HW == 0)
        same = (pair.generated.image_HWC == pair.reference.image_HWC).all(axis=2)
        assert same[inside].all() == (pair.label in (Label.VM, Label.FM))
        assert same[outside].all() == (pair.label in (Label.VM, Label.BM))


@pytest.mark.parametrize("areas", [(0.03, 0.05), (0.2, 0.35), (0.7, 0.9)])
def test_traps_have_one_silhouette_of_the_size_asked_for_and_other_content(areas: tuple[float, float]) -> None:
    for pair in draw_traps(12, 4, areas=areas):
        assert areas[0] * 0.96 <= pair.area <= areas[1] * 1.04
        np.testing.assert_array_equal(pair.generated.mask_HW, pair.reference.mask_HW)
        difference = np.abs(pair.generated.image_HWC.astype(int) - pair.reference.image_HWC).mean(axis=2)
        assert difference[pair.generated.mask_HW == 1].max() > 10
        assert difference[pair.generated.mask_HW == 0].max() > 10


def test_photographs_for_calibration_and_evaluation_are_different_ones() -> None:
    assert not set(HALVES[0]) & set(HALVES[1])
    assert len(installed(0)) >= 2
    assert len(installed(1)) >= 2
    labels = [pair.label for pair in draw_photograph_pairs(1, 1, 1)]
    assert labels == list(Label)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_corruptions_change_the_copy_alone_and_the_same_way_again(corruption) -> None:  # type: ignore[no-untyped-def]
    pair = next(islice(draw_pairs(13, 1, labels=(Label.VM,)), 1))
    spoilt = corruption.apply(pair, 5)
    assert spoilt.reference is pair.reference
    assert spoilt.label is pair.label
    assert spoilt.generated.image_HWC.dtype == np.uint8
    assert (spoilt.generated.image_HWC != pair.generated.image_HWC).any()
    assert 0 <= spoilt.generated.mask_HW.min() <= spoilt.generated.mask_HW.max() <= 1
    np.testing.assert_array_equal(spoilt.generated.image_HWC, corruption.apply(pair, 5).generated.image_HWC)


def test_occlusion_hides_the_share_it_names() -> None:
    pair = next(draw_pairs(14, 1, labels=(Label.VM,)))
    spoilt = next(c for c in CORRUPTIONS if c.name == "occlusion 30 %").apply(pair, 1)
    assert spoilt.area == pytest.approx(0.7 * pair.area, rel=0.1)


def test_one_seed_for_both_sets_is_refused() -> None:
    with pytest.raises(MemscanError, match="different seeds"):
        evaluate_metric({"region": MetricConfig(variant="region", canvas=128)}, seed=3, calibration_seed=3)


@pytest.mark.long
def test_region_and_robust_keep_their_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/metric.md with few pairs and corruptions: thresholds are bounded at 5 % and vary widely.

    What must hold here does not lean on them: how well scores part copies from others.
    """
    monkeypatch.setattr(variants, "CORRUPTIONS", [one for one in CORRUPTIONS if one.name in FEW])
    monkeypatch.setattr(variants, "AREA_BINS", AREA_BINS[::2])
    configs = {name: MetricConfig.model_validate({"variant": name, "canvas": 128}) for name in ("region", "robust")}
    document, calibrations = evaluate_metric(configs, seed=7, calibration_seed=8, count=3, bound=0.05)
    region, robust = (document["variants"][name] for name in configs)
    for row in (region["clean"], robust["clean"]):
        assert min(row["auc_foreground"], row["auc_background"]) >= 0.97
    parts = {
        name: np.mean(
            [row[f"auc_{r}"] for row in variant["corruptions"].values() for r in ("foreground", "background")]
        )
        for name, variant in (("region", region), ("robust", robust))
    }
    assert parts["robust"] >= 0.95
    assert parts["robust"] > parts["region"]
    assert calibrations["region"].max_false_positive_rate <= 0.05
    table = metric_tables(document)
    assert "| jpeg 30 |" in table
    assert "seed 8" in table


@pytest.mark.parametrize("variant", ["region", pytest.param("robust", marks=pytest.mark.long)])
def test_shipped_thresholds_keep_their_bound_on_fresh_traps(variant: str) -> None:
    """Unrelated content under one silhouette, of a seed that chose nothing.

    The shipped thresholds were bounded at 2 % with 95 % confidence. Among 112 pairs of a true rate of 2 %, more than 6
    are flagged once in 100 seeds.
    """
    metric = load_metric(MetricConfig.model_validate({"variant": variant, "canvas": 128}))
    pairs = [
        pair
        for low, high in AREA_BINS[1:]
        for draw in (
            draw_traps(31, 8, areas=(low, high), size=64),
            draw_photograph_traps(31, 8, 1, areas=(low, high), size=64),
        )
        for pair in draw
    ]
    assert len(pairs) == 112
    fired = [metric.classify(scores) is not Label.NM for scores in score_pairs(metric, pairs)]
    assert sum(fired) <= 6
