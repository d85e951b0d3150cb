"""What holds for every variant of the metric, whatever the images: Hypothesis draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memscan.config import MetricConfig
from memscan.errors import Reason, RowReject
from memscan.metric import FbMem, RegionScores, load_metric
from memscan.planted.renderer import Scene, random_background, random_object, render
from memscan.records import Label

CANVAS = {"paper": 176, "region": 128, "robust": 128}
SIDE = 64
# Seen over twelve pairs: .005, .16 and 1e-6.
SWAPPED = {"paper": 0.02, "region": 0.25, "robust": 0.001}
VARIANTS: dict[str, FbMem[Any]] = {
    name: load_metric(
        MetricConfig.model_validate(
            {"variant": name, "canvas": canvas, "foreground_threshold": 0.75, "background_threshold": 0.75}
        )
    )
    for name, canvas in CANVAS.items()
}
every_variant = pytest.mark.parametrize("variant", list(CANVAS))
seeds = st.integers(0, 2**32 - 1)
property_test = settings(max_examples=8, deadline=None)

Picture = tuple[np.ndarray, np.ndarray]


def _picture(seed: int) -> Picture:
    """A rendered scene, or noise under a random soft mask: every third seed."""
    rng = np.random.default_rng(seed)
    if seed % 3:
        return render(Scene(random_object(rng), random_background(rng)))
    return rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), rng.random((SIDE, SIDE)).astype(np.float32)


def _score(variant: str, a: Picture, b: Picture) -> RegionScores:
    metric = VARIANTS[variant]
    return metric.score(metric.prepare(*a), [metric.prepare(*b)])[0]


def _values(scores: RegionScores) -> tuple[float, float, float]:
    return scores.foreground, scores.background, scores.whole


@every_variant
@property_test
@example(9151)  # a plain background, which takes the foreground's score as far as the outlines agree
@given(seeds)
def test_an_image_is_its_own_copy(variant: str, seed: int) -> None:
    assert _values(_score(variant, _picture(seed), _picture(seed))) == pytest.approx((1, 1, 1), abs=1e-4)


@every_variant
@property_test
@given(seeds, seeds)
def test_swapping_the_images_changes_nothing(variant: str, one: int, other: int) -> None:
    """Both orders, where no region is degenerate: `paper` asks the generated image alone whether one is."""
    a, b = _picture(one), _picture(other)
    if min(abs(picture[1].mean() - side) for picture in (a, b) for side in (0, 1)) < 0.05:
        return
    forth, back = _score(variant, a, b), _score(variant, b, a)
    # Sums in another order; the alignment of `robust` chooses among nearly equal shifts.
    assert _values(forth) == pytest.approx(_values(back), abs=2e-3 if variant == "robust" else 1e-4)


@every_variant
@property_test
@given(seeds, seeds)
def test_scores_lie_between_0_and_1(variant: str, one: int, other: int) -> None:
    assert all(0 <= value <= 1 for value in _values(_score(variant, _picture(one), _picture(other))))


@every_variant
def test_the_complement_of_the_masks_swaps_what_was_copied(variant: str) -> None:
    """One object before two backgrounds: the copy is in the foreground, and after the exchange in the background.

    Scores are swapped nearly, not exactly: `paper` fills black here and white there, and windows astride the border
    count for a foreground where either image has it, for a background where both do.
    """
    for seed in range(12):
        rng = np.random.default_rng(100 + seed)
        thing = random_object(rng)
        a, b = (render(Scene(thing, random_background(rng))) for _ in range(2))
        plain = _score(variant, a, b)
        turned = _score(variant, (a[0], 1 - a[1]), (b[0], 1 - b[1]))
        assert turned.whole == pytest.approx(plain.whole, abs=1e-5)
        assert plain.foreground > plain.background
        assert turned.background > turned.foreground
        assert plain.foreground == pytest.approx(turned.background, abs=SWAPPED[variant])


def _mask(kind: str) -> np.ndarray:
    mask = np.full((SIDE, SIDE), 1.0 if kind == "full" else 0.0, np.float32)
    if kind == "one pixel":
        mask[30, 30] = 1
    return mask


@every_variant
@pytest.mark.parametrize("kind", ["empty", "full", "one pixel"])
def test_a_degenerate_mask_gives_both_regions_one_score(variant: str, kind: str) -> None:
    a, b = _picture(1), _picture(2)
    scores = _score(variant, (a[0], _mask(kind)), (b[0], _mask(kind)))
    assert scores.foreground == scores.background
    same = _score(variant, (a[0], _mask(kind)), (a[0], _mask(kind)))
    assert same.copied == same.missing == (("background",) if kind == "full" else ("foreground",))
    assert VARIANTS[variant].classify(same) is (Label.VM if kind == "full" else Label.BM)


@every_variant
@property_test
@given(seeds, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_without_a_foreground_there_is_no_vm_and_no_fm(variant: str, seed: int, front: float, back: float) -> None:
    """Whatever the thresholds, and whichever of the two images has no foreground."""
    config = VARIANTS[variant].config.model_copy(update={"foreground_threshold": front, "background_threshold": back})
    metric = load_metric(config)
    picture = render(Scene(random_object(np.random.default_rng(seed)), random_background(np.random.default_rng(seed))))
    for a, b in (("empty", None), (None, "empty"), ("empty", "one pixel")):
        masks = [picture[1] if kind is None else _mask(kind) for kind in (a, b)]
        (scores,) = metric.score(metric.prepare(picture[0], masks[0]), [metric.prepare(picture[0], masks[1])])
        assert scores.missing == scores.copied == ("foreground",)
        assert metric.classify(scores) in (Label.BM, Label.NM)
        assert (metric.margin(scores) >= 0) == (metric.classify(scores) is Label.BM)


@every_variant
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_mask_that_is_not_finite_rejects_the_row(variant: str, value: float) -> None:
    image, mask = _picture(1)
    broken = mask.copy()
    broken[0, 0] = value
    with pytest.raises(RowReject) as caught:
        VARIANTS[variant].prepare(image, broken)
    assert caught.value.reason is Reason.SEGMENTATION_FAILED
