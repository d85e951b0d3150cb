"""The robust variant: what it forgives, what it does not, and a slow oracle of its search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from memscan.config import MetricConfig
from memscan.evaluation.corruptions import CORRUPTIONS
from memscan.evaluation.pairs import Pair, draw_pairs, draw_recoloured, draw_traps
from memscan.metric import RegionScores, RobustFbMem
from memscan.metric.robust import REACH, SCALES, UNMATCHED, _align
from memscan.records import Label

CONFIG = MetricConfig(variant="robust", canvas=128)
REGIONS = ("foreground", "background", "whole")


@pytest.fixture(scope="module")
def metric() -> RobustFbMem:
    return RobustFbMem(CONFIG)


def _score(metric: RobustFbMem, pair: Pair) -> RegionScores:
    generated, reference = pair.generated, pair.reference
    return metric.score(
        metric.prepare(generated.image_HWC, generated.mask_HW),
        [metric.prepare(reference.image_HWC, reference.mask_HW)],
    )[0]


@pytest.mark.parametrize("seed", range(3))
def test_identity_symmetry_and_range(metric: RobustFbMem, seed: int) -> None:
    same, other = draw_pairs(seed, 1, labels=(Label.VM, Label.NM))
    score = _score(metric, same)
    assert (score.foreground, score.background, score.whole) == pytest.approx((1, 1, 1), abs=1e-3)
    forth = _score(metric, other)
    back = _score(metric, replace(other, generated=other.reference, reference=other.generated))
    for name in REGIONS:
        assert getattr(forth, name) == pytest.approx(getattr(back, name), abs=1e-3)
        assert 0 <= getattr(forth, name) <= 1


def test_the_complement_of_a_mask_swaps_the_regions_of_a_copy(metric: RobustFbMem) -> None:
    """Of a verbatim copy, so that neither region pays for what the other image has not."""
    for pair in draw_pairs(4, 2, labels=(Label.VM,)):
        turned = [replace(p, mask_HW=1 - p.mask_HW) for p in (pair.generated, pair.reference)]
        plain, swapped = _score(metric, pair), _score(metric, replace(pair, generated=turned[0], reference=turned[1]))
        assert plain.foreground == pytest.approx(swapped.background, abs=0.01)
        assert plain.background == pytest.approx(swapped.foreground, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_empty_region_takes_the_other_score(metric: RobustFbMem, value: float) -> None:
    pair = next(draw_pairs(1, 1, labels=(Label.NM,)))
    generated, reference = (
        replace(p, mask_HW=np.full_like(p.mask_HW, value)) for p in (pair.generated, pair.reference)
    )
    score = _score(metric, replace(pair, generated=generated, reference=reference))
    assert score.foreground == score.background


def test_a_recoloured_object_is_found_and_another_one_under_its_outline_is_not(metric: RobustFbMem) -> None:
    copies = [metric.classify(_score(metric, pair)) for pair in draw_recoloured(31, 8)]
    others = [metric.classify(_score(metric, pair)) for pair in draw_traps(32, 8, areas=(0.1, 0.5))]
    assert copies.count(Label.FM) >= 7
    assert others.count(Label.NM) >= 7


@pytest.mark.parametrize(
    "name", ["shift 8 px", "scale -10 %", "hue 180°", "brightness 40 %", "jpeg 30", "occlusion 20 %"]
)
def test_a_spoilt_copy_stays_above_what_is_unrelated(metric: RobustFbMem, name: str) -> None:
    corruption = next(corruption for corruption in CORRUPTIONS if corruption.name == name)
    pairs = [corruption.apply(pair, number) for number, pair in enumerate(draw_pairs(33, 2))]
    scores = {label: [_score(metric, pair) for pair in pairs if pair.label is label] for label in Label}
    copied = np.mean([score.foreground for score in scores[Label.FM] + scores[Label.VM]])
    other = np.mean([score.foreground for score in scores[Label.BM] + scores[Label.NM]])
    assert copied > other + 0.3


def test_search_equals_sliding_one_image_over_the_other(metric: RobustFbMem) -> None:
    """The FFT against slices, at the best place of every region; equal to 1e-3 of the cells."""
    pair = next(draw_pairs(9, 1, labels=(Label.FM,)))
    moved = next(c for c in CORRUPTIONS if c.name == "shift 4 px").apply(pair, 3)
    a = metric.prepare(moved.generated.image_HWC, moved.generated.mask_HW)
    b = metric.prepare(moved.reference.image_HWC, moved.reference.mask_HW)
    found = _align(a, [b])
    for region in range(3):
        best = (-1.0, 0, 0, 0)
        for step in range(len(SCALES)):
            x, y = a.cells_KRCHW[step, region], b.cells_KRCHW[-1 - step, region]
            best = max(best, _slid(x, y, step, UNMATCHED if region == 1 else 0.0))
        assert best[1:] == (
            int(found.scale_NR[0, region]),
            int(found.dy_NR[0, region]),
            int(found.dx_NR[0, region]),
        )


def _slid(x: torch.Tensor, y: torch.Tensor, step: int, price: float) -> tuple[float, int, int, int]:
    """Best Dice coefficient over all shifts by slices, as the module's docstring defines it."""
    best, size = (-1.0, step, 0, 0), x.shape[-1]
    least = min(float(x[6].sum()), float(y[6].sum())) / 2
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            p = x[:, max(0, -dy) : size - max(0, dy), max(0, -dx) : size - max(0, dx)].double()
            q = y[:, max(0, dy) : size - max(0, -dy), max(0, dx) : size - max(0, -dx)].double()
            if float((p[6] * q[6]).sum()) < least:
                continue
            inside = float((p[5] * q[6] + p[6] * q[5]).sum())
            total = float((x[5] * x[6]).sum() + (y[5] * y[6]).sum())
            dice = float((p[:5] * q[:5]).sum()) / (((1 - price) * inside + price * total) / 2 + 1e-2)
            dice *= 1 - 0.05 / 64 * min(dy * dy + dx * dx, 128) - 0.02 * abs(step - 2)
            best = max(best, (dice, step, dy, dx))
    return best
