"""The tone of a background: a correlation that only the background's cells decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memscan.metric.tone import Tone, prepare_tone, tone

CPU = torch.device("cpu")


def prepared(image_HWC: np.ndarray, mask_HW: np.ndarray | None) -> Tone:
    return prepare_tone(image_HWC, mask_HW, CPU)


@pytest.fixture
def blocks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cells of one shade each, so that reducing changes nothing, and a mask of whole cells."""
    shades = rng.integers(0, 250, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.float32)
    mask[8:20, 4:30] = 1
    return shades, mask


def test_it_is_the_correlation_over_the_background(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    image, mask = blocks
    other = np.random.default_rng(9).integers(0, 250, image.shape, dtype=np.uint8)
    outside = mask == 0
    expected = np.corrcoef(image.mean(2)[outside], other.mean(2)[outside])[0, 1]
    assert tone(prepared(other, None), prepared(image, mask)) == pytest.approx(expected, abs=0.02)


def test_what_the_object_hides_does_not_count(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    image, mask = blocks
    changed = image.copy()
    changed[8:20, 4:30] = 255 - changed[8:20, 4:30]
    # The floor under the deviations takes 3.5 % where their product is .028.
    assert tone(prepared(changed, None), prepared(image, mask)) == pytest.approx(1, abs=0.05)
    assert tone(prepared(255 - image, None), prepared(image, mask)) < -0.95


def test_an_even_background_correlates_with_nothing(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    image, mask = blocks
    assert abs(tone(prepared(np.full_like(image, 90), None), prepared(image, mask))) < 0.05
    with pytest.raises(ValueError, match="needs its mask"):
        tone(prepared(image, mask), prepared(image, None))
