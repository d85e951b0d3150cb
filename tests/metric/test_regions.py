"""Composition of foreground and background."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from memscan.errors import Reason, RowReject
from memscan.metric.regions import compose_background, compose_foreground

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_full_and_empty_masks_give_the_image_or_the_fill() -> None:
    one, none = np.ones((20, 30), np.float32), np.zeros((20, 30), np.float32)
    np.testing.assert_array_equal(compose_foreground(IMAGE, one), IMAGE)
    np.testing.assert_array_equal(compose_background(IMAGE, none), IMAGE)
    assert (compose_foreground(IMAGE, none) == 0).all()
    assert (compose_background(IMAGE, one) == 255).all()


def test_soft_masks_blend_as_pillow_does() -> None:
    levels = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    mask, picture = levels.astype(np.float32) / 255, Image.fromarray(IMAGE)
    black, white = Image.new("RGB", (30, 20), 0), Image.new("RGB", (30, 20), (255, 255, 255))
    foreground = np.asarray(Image.composite(picture, black, Image.fromarray(levels)), np.int16)
    background = np.asarray(Image.composite(white, picture, Image.fromarray(levels)), np.int16)
    assert np.abs(compose_foreground(IMAGE, mask) - foreground).max() <= 1
    assert np.abs(compose_background(IMAGE, mask) - background).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_mask_that_is_not_finite_rejects_the_row(value: float) -> None:
    mask = np.full((20, 30), 0.5)
    mask[3, 4] = value
    with pytest.raises(RowReject) as caught:
        compose_foreground(IMAGE, mask)
    assert caught.value.reason is Reason.SEGMENTATION_FAILED


def test_wrong_shapes_types_and_ranges_are_errors_of_the_caller() -> None:
    with pytest.raises(ValueError, match="shape"):
        compose_background(IMAGE, np.zeros((30, 20)))
    with pytest.raises(ValueError, match="uint8"):
        compose_background(IMAGE.astype(np.float32), np.zeros((20, 30)))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        compose_foreground(IMAGE, np.full((20, 30), 255.0))
