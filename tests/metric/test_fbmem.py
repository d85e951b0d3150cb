"""FB-Mem's paper variant against an exhaustive oracle: torchmetrics on the filled RGBA canvases."""

from __future__ import annotations

import itertools
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as skimage_data
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from memscan.config import MetricConfig
from memscan.errors import Reason, RowReject
from memscan.metric import PaperFbMem, RegionScores
from memscan.records import Label

CONFIG = MetricConfig(canvas=176)
METRIC = PaperFbMem(CONFIG)


def _disc(height: int, width: int, radius: float, centre: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Soft disc: 1 inside, 0 outside, a ramp between; `radius` in units of the smaller side."""
    y, x = np.mgrid[0:height, 0:width]
    side = min(height, width)
    distance = np.hypot((y - centre[0] * height) / side, (x - centre[1] * width) / side)
    return np.clip((radius - distance) * 12 + 0.5, 0, 1).astype(np.float32)


def _crop(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def _oracle_canvas(picture: np.ndarray, mask: np.ndarray | None, fill: int) -> torch.Tensor:
    """RGBA canvas as the release makes it: cut, filled, opaque, resized with Lanczos; float64 in [0, 1]."""
    pixels = picture.astype(np.float64)
    if mask is not None:
        keep = (mask if fill == 0 else 1 - mask)[..., None].astype(np.float64)
        pixels = keep * pixels + (1 - keep) * fill
    filled = Image.fromarray(np.rint(pixels).astype(np.uint8)).convert("RGBA")
    canvas = np.asarray(filled.resize((CONFIG.canvas,) * 2, Image.Resampling.LANCZOS))
    return torch.from_numpy(canvas.astype(np.float64) / 255).permute(2, 0, 1)[None]


def _oracle(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> RegionScores:
    def compare(mask: bool, fill: int) -> float:
        canvases = [_oracle_canvas(picture, own if mask else None, fill) for picture, own in (a, b)]
        return float(multiscale_structural_similarity_index_measure(*canvases, data_range=1.0))

    return RegionScores(foreground=compare(True, 0), background=compare(True, 255), whole=compare(False, 0))


@pytest.fixture(scope="module")
def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    """Photographs of several sizes and aspects with soft masks; the second is a shifted, darker copy of the first."""
    astronaut = _crop(skimage_data.astronaut(), 200, 200)
    copy = np.clip(np.roll(astronaut, 2, axis=1) * 0.9, 0, 255).astype(np.uint8)
    return [
        (astronaut, _disc(200, 200, 0.3)),
        (copy, _disc(200, 200, 0.32, (0.5, 0.51))),
        (_crop(skimage_data.chelsea(), 150, 240), _disc(150, 240, 0.35, (0.4, 0.6))),
        (_crop(skimage_data.coffee(), 64, 64), _disc(64, 64, 0.2)),
        (np.random.default_rng(3).integers(0, 256, (176, 176, 3), dtype=np.uint8), _disc(176, 176, 0.6)),
    ]


def test_pairs_agree_with_the_rgba_oracle(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    prepared = [METRIC.prepare(*case) for case in cases]
    seen = []
    for i, j in ((0, 1), (2, 4)):
        scores, expected = METRIC.score(prepared[i], prepared)[j], _oracle(cases[i], cases[j])
        seen.append(expected.foreground)
        for name in ("foreground", "background", "whole"):
            assert getattr(scores, name) == pytest.approx(getattr(expected, name), abs=1e-4), name
    assert min(seen) < 0.6 < max(seen)


def test_identity_is_one_and_scores_do_not_depend_on_order(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    prepared = [METRIC.prepare(*case) for case in cases[:3]]
    for (i, a), (j, b) in itertools.product(enumerate(prepared), repeat=2):
        forth, back = METRIC.score(a, [b])[0], METRIC.score(b, [a])[0]
        assert forth.foreground == pytest.approx(back.foreground, abs=1e-6)
        assert forth.background == pytest.approx(back.background, abs=1e-6)
        if i == j:
            assert forth == RegionScores(*[pytest.approx(1, abs=1e-6)] * 3, ANY, ANY)
            assert METRIC.classify(forth) is Label.VM


def test_no_references_give_no_scores(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert METRIC.score(METRIC.prepare(*cases[0]), []) == []


def test_copied_regions_get_their_labels() -> None:
    """One object on two backgrounds is FM, two objects on one background BM (τ for this canvas)."""
    metric = PaperFbMem(MetricConfig(canvas=176, foreground_threshold=0.9, background_threshold=0.9))
    mask = _disc(176, 176, 0.35)[..., None]
    cat, noise = _crop(skimage_data.chelsea(), 176, 176), _crop(skimage_data.coffee(), 176, 176)
    other = _crop(skimage_data.astronaut(), 176, 176)

    def paste(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
        return np.rint(mask * inner + (1 - mask) * outer).astype(np.uint8)

    generated = metric.prepare(paste(cat, noise), mask[..., 0])
    references = [paste(other, cat), paste(other, noise), paste(cat, other), paste(cat, noise)]
    scores = metric.score(generated, [metric.prepare(image, mask[..., 0]) for image in references])
    assert [metric.classify(s) for s in scores] == [Label.NM, Label.BM, Label.FM, Label.VM]
    assert metric.match(scores) == (3, Label.VM)
    assert metric.match(scores[:3]) == (2, Label.FM)


def test_degenerate_region_takes_the_other_score(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    picture, reference = cases[0][0], METRIC.prepare(*cases[1])
    shape = picture.shape[:2]
    empty, full = METRIC.prepare(picture, np.zeros(shape)), METRIC.prepare(picture, np.ones(shape))
    assert (empty.foreground_degenerate, empty.background_degenerate) == (True, False)
    assert (full.foreground_degenerate, full.background_degenerate) == (False, True)
    no_object, all_object = METRIC.score(empty, [reference])[0], METRIC.score(full, [reference])[0]
    assert no_object.foreground == no_object.background
    assert all_object.background == all_object.foreground
    against_itself = METRIC.score(empty, [empty])[0]
    missing = ("foreground",)
    assert against_itself == RegionScores(*[pytest.approx(1, abs=1e-6)] * 3, ANY, ANY, missing, missing)
    assert METRIC.classify(against_itself) is Label.BM


def test_one_pixel_is_not_a_region(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    picture, reference = cases[0][0], METRIC.prepare(*cases[1])
    mask = np.zeros(picture.shape[:2])
    mask[100, 100] = 1
    one = METRIC.prepare(picture, mask)
    assert one.foreground_area == pytest.approx(1 / mask.size)
    scores = METRIC.score(one, [reference])[0]
    assert one.foreground_degenerate
    assert scores.foreground == scores.background


def test_both_regions_degenerate_fall_back_to_the_whole_image(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    blank = METRIC.prepare(np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64)))
    assert blank.foreground_degenerate
    assert blank.background_degenerate
    scores = METRIC.score(blank, [METRIC.prepare(*cases[0]), blank])
    assert scores[0].foreground == scores[0].background == scores[0].whole
    assert METRIC.classify(scores[0]) is Label.NM
    assert METRIC.classify(scores[1]) is Label.BM


def test_one_image_without_a_region_is_enough(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    picture, mask = cases[0]
    own, empty = METRIC.prepare(picture, mask), METRIC.prepare(picture, np.zeros_like(mask))
    for scores in (METRIC.score(own, [empty])[0], METRIC.score(empty, [own])[0]):
        assert scores.foreground == scores.background
        assert scores.copied == scores.missing == ("foreground",)


@pytest.mark.parametrize(("area", "degenerate"), [(0.025, True), (0.035, False)])
def test_degenerate_area_is_a_share_of_the_image(area: float, degenerate: bool) -> None:
    mask = np.zeros((200, 200))
    mask[:100, : round(200 * 2 * area)] = 1
    assert METRIC.prepare(np.full((200, 200, 3), 128, np.uint8), mask).foreground_degenerate is degenerate


def test_a_mask_that_is_not_finite_rejects_the_row() -> None:
    with pytest.raises(RowReject) as caught:
        METRIC.prepare(np.zeros((64, 64, 3), np.uint8), np.full((64, 64), np.nan))
    assert caught.value.reason is Reason.SEGMENTATION_FAILED


@pytest.mark.parametrize(
    ("scores", "label", "margin"),
    [
        ((0.9, 0.85), Label.VM, 0.05),
        ((0.8, 0.8), Label.VM, 0.0),
        ((0.95, 0.7), Label.FM, 0.15),
        ((0.3, 0.85), Label.BM, 0.05),
        ((0.79, 0.2), Label.NM, -0.01),
    ],
)
def test_labels_and_margins(scores: tuple[float, float], label: Label, margin: float) -> None:
    region = RegionScores(*scores, whole=0.0)
    assert METRIC.classify(region) is label
    assert METRIC.margin(region) == pytest.approx(margin)


def test_thresholds_are_separate() -> None:
    metric = PaperFbMem(MetricConfig(canvas=176, foreground_threshold=0.9, background_threshold=0.6))
    assert metric.classify(RegionScores(0.85, 0.65, 0)) is Label.BM
    assert metric.classify(RegionScores(0.95, 0.55, 0)) is Label.FM


unit = st.floats(0, 1, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(RegionScores, unit, unit, unit), min_size=1, max_size=8))
def test_match_is_the_most_severe_then_the_best(candidates: list[RegionScores]) -> None:
    index, label = METRIC.match(candidates)
    order = [Label.VM, Label.FM, Label.BM, Label.NM]
    expected = min(
        range(len(candidates)),
        key=lambda i: (
            order.index(METRIC.classify(candidates[i])),
            -(candidates[i].foreground + candidates[i].background),
            i,
        ),
    )
    assert (index, label) == (expected, METRIC.classify(candidates[expected]))
    assert (METRIC.margin(candidates[index]) >= 0) == (label is not Label.NM)


def test_match_needs_a_candidate() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        METRIC.match([])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_scores_stay_in_range_for_any_masks(seed: int, low: float, high: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(2)]
    masks = [np.where(rng.random(shape) < cut, rng.random(shape), 0.0) for cut in (low, high)]
    a, b = (METRIC.prepare(p, m) for p, m in zip(pictures, masks, strict=True))
    scores = METRIC.score(a, [b])[0]
    assert all(0 <= value <= 1 for value in (scores.foreground, scores.background, scores.whole))
