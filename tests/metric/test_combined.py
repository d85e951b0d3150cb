"""The combined variant: its terms are those of region and robust, and its weights are checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from memscan.config import CensusConfig, MetricConfig, shipped_weights_path
from memscan.errors import InputError
from memscan.evaluation.pairs import draw_pairs
from memscan.metric import load_metric
from memscan.metric.combination import Combination
from memscan.records import Label

METRIC = load_metric(MetricConfig())


def test_a_score_is_the_logistic_of_terms_that_region_and_robust_give() -> None:
    pair = next(draw_pairs(5, 1, labels=(Label.VM,)))
    (scores,) = METRIC.score(
        METRIC.prepare(pair.generated.image_HWC, None),
        [METRIC.prepare(pair.reference.image_HWC, pair.reference.mask_HW)],
    )
    for variant in ("region", "robust"):
        own = load_metric(MetricConfig.model_validate({"variant": variant, "canvas": 128, "masks": "reference"}))
        (single,) = own.score(
            own.prepare(pair.generated.image_HWC, None),
            [own.prepare(pair.reference.image_HWC, pair.reference.mask_HW)],
        )
        assert scores.terms[f"{variant}_foreground"] == pytest.approx(single.foreground, abs=1e-6)
        assert scores.terms[f"{variant}_background"] == pytest.approx(single.background, abs=1e-6)
    weights = json.loads(shipped_weights_path(128).read_text(encoding="utf-8"))["plain"]["foreground"]
    expected = expit(weights["intercept"] + sum(w * scores.terms[name] for name, w in weights["weights"].items()))
    assert scores.foreground == pytest.approx(float(expected))
    assert METRIC.classify(scores) is Label.VM


def test_similarities_by_region_are_terms_where_they_are_known() -> None:
    pair = next(draw_pairs(6, 1, labels=(Label.NM,)))
    own = METRIC.prepare(pair.generated.image_HWC, None)
    other = METRIC.prepare(pair.reference.image_HWC, pair.reference.mask_HW)
    low, high = (
        METRIC.score_found(own, [other], [{"foreground": value, "background": value}])[0] for value in (0.0, 0.9)
    )
    assert high.terms["similarity_foreground"] == 0.9
    assert high.foreground > low.foreground
    assert high.background > low.background
    assert "similarity_foreground" not in METRIC.score(own, [other])[0].terms


@pytest.mark.parametrize("variant", ["region", "robust", "combined"])
def test_under_the_references_mask_the_generations_own_says_nothing(variant: str) -> None:
    values = {"variant": variant, "canvas": 128, "masks": "reference"}
    metric = load_metric(MetricConfig.model_validate(values))
    pair = next(draw_pairs(7, 1, labels=(Label.FM,)))
    other = metric.prepare(pair.reference.image_HWC, pair.reference.mask_HW)
    masks = (None, pair.generated.mask_HW, np.zeros_like(pair.generated.mask_HW))
    scores = [metric.score(metric.prepare(pair.generated.image_HWC, mask), [other])[0] for mask in masks]
    for one in scores[1:]:
        assert (one.foreground, one.background) == (scores[0].foreground, scores[0].background)
    copy = metric.score(metric.prepare(pair.reference.image_HWC, None), [other])[0]
    assert metric.classify(copy) is Label.VM


def test_a_generation_without_a_mask_is_refused_where_each_image_has_its_own() -> None:
    metric = load_metric(MetricConfig(variant="region", canvas=128))
    with pytest.raises(ValueError, match="needs its own mask"):
        metric.prepare(np.zeros((64, 64, 3), np.uint8), None)


@pytest.mark.parametrize("change", [{"format": 9}, {"plain": None}, {"canvas": "wide"}])
def test_weights_that_are_none_are_told_in_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({**json.loads(shipped_weights_path(128).read_text(encoding="utf-8")), **change}))
    with pytest.raises(InputError, match="is not a file of weights"):
        Combination.load(str(path))


def test_what_a_section_means_that_leaves_keys_out() -> None:
    assert (MetricConfig().variant, MetricConfig().canvas, MetricConfig().masks) == ("combined", 128, "reference")
    # As before there was a choice: a section with a canvas or a threshold meant the published variant.
    old = MetricConfig(foreground_threshold=0.9)
    assert (old.variant, old.canvas, old.background_threshold) == ("paper", 512, 0.8)
    with pytest.raises(ValueError, match="weights of combined ship for canvases"):
        MetricConfig(variant="combined", canvas=192)


def test_a_configuration_that_names_its_variant_has_the_fingerprint_that_it_had() -> None:
    """Made by the version before there were masks to choose."""
    content = {
        "prompts": {"paths": ["p.csv"]},
        "generator": {"path": "g"},
        "segmenter": {"path": "s.onnx"},
        "embedder": {"path": "e.pt", "sha256": "0" * 64},
        "index": {"path": "i"},
        "metric": {"variant": "paper"},
    }
    assert CensusConfig.model_validate(content).fingerprint() == "6375d21495699f59"
