"""The region variant: properties, the silhouette trap, and a slow oracle of its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memscan.config import MetricConfig
from memscan.metric import CombinedFbMem, FbMem, PaperFbMem, RegionFbMem, RobustFbMem, load_metric
from memscan.metric.region import scales_of
from memscan.metric.ssim import WEIGHTS
from memscan.planted.renderer import Scene, random_background, random_object, render

CONFIG = MetricConfig(variant="region", canvas=128)


def _scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    return Scene(random_object(rng), random_background(rng))


@pytest.fixture(scope="module")
def metric() -> RegionFbMem:
    return RegionFbMem(CONFIG)


def _score(metric: FbMem[Any], a: Scene, b: Scene):  # type: ignore[no-untyped-def]
    return metric.score(metric.prepare(*render(a)), [metric.prepare(*render(b))])[0]


def test_the_configuration_chooses_the_variant() -> None:
    assert type(load_metric(CONFIG)) is RegionFbMem
    assert type(load_metric(MetricConfig())) is CombinedFbMem
    assert type(load_metric(MetricConfig(canvas=176))) is PaperFbMem
    assert type(load_metric(MetricConfig(variant="robust", canvas=128))) is RobustFbMem


@pytest.mark.parametrize(("canvas", "scales"), [(32, 1), (128, 3), (176, 3), (256, 4), (512, 5)])
def test_windows_stay_below_the_published_share_of_the_canvas(canvas: int, scales: int) -> None:
    assert scales_of(canvas) == scales


@pytest.mark.parametrize("seed", range(5))
def test_identity_symmetry_and_range(metric: RegionFbMem, seed: int) -> None:
    same = _score(metric, _scene(seed), _scene(seed))
    assert (same.foreground, same.background, same.whole) == pytest.approx((1, 1, 1), abs=1e-5)
    one, other = _score(metric, _scene(seed), _scene(seed + 50)), _score(metric, _scene(seed + 50), _scene(seed))
    for name in ("foreground", "background", "whole"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5)
        assert 0 <= getattr(one, name) <= 1


def test_a_shared_part_scores_high_and_the_other_low(metric: RegionFbMem) -> None:
    """One object before other backgrounds, and one background behind other objects, 20 pairs each.

    Windows at the border see the other region too, so a shared part does not reach 1. What must hold is the order:
    every shared part above every part that is not shared, for each region.
    """
    foreground, background, unrelated = [], [], []
    for seed in range(20):
        a, b = _scene(seed), _scene(1000 + seed)
        foreground.append(_score(metric, a, Scene(a.object, b.background)))
        background.append(_score(metric, a, Scene(b.object, a.background)))
        unrelated.append(_score(metric, a, b))
    shared = min(score.foreground for score in foreground), min(score.background for score in background)
    foreign = (
        max(score.foreground for score in background + unrelated),
        max(score.background for score in foreground + unrelated),
    )
    assert shared[0] > foreign[0]
    assert shared[1] > foreign[1]


def test_one_silhouette_does_not_make_a_match(metric: RegionFbMem) -> None:
    """Unrelated content under the same mask: the published variant rises with the fill, this one does not."""
    paper = PaperFbMem(MetricConfig(variant="paper", canvas=176))
    differences = []
    for seed in range(10):
        image, mask = render(_scene(seed))
        other, _ = render(_scene(seed + 300))
        filled = paper.score(paper.prepare(image, mask), [paper.prepare(other, mask)])[0].foreground
        region = metric.score(metric.prepare(image, mask), [metric.prepare(other, mask)])[0].foreground
        differences.append(filled - region)
    assert np.mean(differences) > 0.25


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_empty_region_takes_the_other_score(metric: RegionFbMem, value: float) -> None:
    image, mask = render(_scene(1))
    other, _ = render(_scene(2))
    flat = np.full_like(mask, value)
    score = metric.score(metric.prepare(image, flat), [metric.prepare(other, flat)])[0]
    assert score.foreground == score.background
    assert score.whole == pytest.approx(score.foreground, abs=1e-4)


def test_equals_a_slow_oracle(metric: RegionFbMem) -> None:
    """The definition written out with scipy's Gaussian filter in double precision; equal to 1e-4."""
    from scipy.ndimage import correlate1d

    (a, mask_a), (b, mask_b) = render(_scene(3)), render(_scene(4))
    got = metric.score(metric.prepare(a, mask_a), [metric.prepare(b, mask_b)])[0]
    kernel = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, kernel, axis=0, mode="mirror"), kernel, axis=1, mode="mirror")

    def canvases(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from memscan.io.images import resize

        grown = torch.nn.functional.interpolate(
            torch.from_numpy(mask)[None, None], (128, 128), mode="bilinear", antialias=True
        )
        return resize(image, (128, 128)).astype(float) / 255, grown[0, 0].clamp(0, 1).double().numpy()

    (x, m), (y, n) = canvases(a, mask_a), canvases(b, mask_b)
    exponents = np.array(WEIGHTS[:3]) / sum(WEIGHTS[:3])
    product = np.ones(3)
    for scale in range(3):
        maps = []
        for c in range(3):
            p, q = x[..., c], y[..., c]
            covariance = blur(p * q) - blur(p) * blur(q)
            spread = blur(p * p) - blur(p) ** 2 + blur(q * q) - blur(q) ** 2
            structure = (2 * covariance + 0.03**2) / (spread + 0.03**2)
            if scale == 2:
                structure *= (2 * blur(p) * blur(q) + 0.01**2) / (blur(p) ** 2 + blur(q) ** 2 + 0.01**2)
            maps.append(structure)
        structure, common = np.mean(maps, axis=0), (1 - blur(m)) * (1 - blur(n))
        if scale < 2:
            structure, common = structure[5:-5, 5:-5], common[5:-5, 5:-5]
        for region, share in enumerate((np.ones_like(common), 1 - common, common)):
            weight = np.clip((share - 0.7) / 0.3, 0, None) ** 2 if region else share
            product[region] *= max((structure * weight).sum() / weight.sum(), 0) ** exponents[scale]
        x, y = (v.reshape(v.shape[0] // 2, 2, v.shape[1] // 2, 2, 3).mean((1, 3)) for v in (x, y))
        m, n = (v.reshape(v.shape[0] // 2, 2, v.shape[1] // 2, 2).mean((1, 3)) for v in (m, n))
    assert (got.whole, got.foreground, got.background) == pytest.approx(tuple(product), abs=1e-4)
