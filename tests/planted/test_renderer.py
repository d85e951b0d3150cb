"""The renderer: exact masks, free parameters, determinism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memscan.planted.renderer import PATTERNS, SHAPES, TEXTURES, Scene, random_background, random_object, render


def _scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    return Scene(random_object(rng), random_background(rng))


def test_same_scene_same_pixels() -> None:
    first, second = render(_scene(3)), render(_scene(3))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_mask_is_exactly_where_the_object_is() -> None:
    """Changing the background changes no pixel with coverage 1; changing the object none with coverage 0."""
    scene = _scene(5)
    image, mask = render(scene)
    rng = np.random.default_rng(6)
    other_background, _ = render(replace(scene, background=random_background(rng)))
    assert np.array_equal(image[mask == 1], other_background[mask == 1])
    assert (image[mask == 0] != other_background[mask == 0]).mean() > 0.9
    other_object, other_mask = render(replace(scene, object=random_object(rng)))
    outside = (mask == 0) & (other_mask == 0)
    assert np.array_equal(image[outside], other_object[outside])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_a_useful_share(shape: str) -> None:
    areas = [
        render(Scene(random_object(np.random.default_rng(s), shape), _scene(s).background))[1].mean() for s in range(8)
    ]
    assert min(areas) > 0.1
    assert max(areas) < 0.55


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_varies_within_one_image_and_between_two(pattern: str) -> None:
    images = [
        render(replace(_scene(1), background=random_background(np.random.default_rng(s), pattern, "blue")))[0]
        for s in (1, 2)
    ]
    mask = render(_scene(1))[1]
    for image in images:
        assert image[mask == 0].std(axis=0).max() > 4
    assert np.abs(images[0].astype(int) - images[1])[mask == 0].mean() > 8


def test_textures_show() -> None:
    base = _scene(9)
    plain, mask = render(replace(base, object=replace(base.object, texture="plain")))
    for texture in TEXTURES[1:]:
        textured, _ = render(replace(base, object=replace(base.object, texture=texture)))
        assert np.abs(plain.astype(int) - textured)[mask > 0.9].mean() > 3


def test_unknown_pattern_is_refused() -> None:
    scene = _scene(1)
    with pytest.raises(ValueError, match="unknown pattern"):
        render(replace(scene, background=replace(scene.background, pattern="tartan")))
