"""This module renders pairs of pictures with a known relation: what is copied, with which outline, at which size.

A VM pair is one scene twice, an FM pair has one object before two backgrounds, a BM pair has one background behind two
objects, and an NM pair has nothing in common. A *trap* is an NM pair with different content under the same mask, to
which a metric with constant fill gives a high score.

Two unrelated plain objects under one outline differ only in colour. They are a recoloured copy by any definition that
tolerates other colours. Therefore at most one of two objects that must differ is plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from memscan.planted.renderer import SIZE, Object, Scene, random_background, random_object, render, render_layers
from memscan.records import Label

Array = NDArray[np.float32]

# Share of the image an object fills, as for the planted world, and a little beyond.
USUAL_AREAS = (0.1, 0.5)
_AREA_TOLERANCE = 0.03  # relative
_REACH = 1.5  # largest radius tried, in image sides: the corners of the image lie at 0.71


@dataclass(frozen=True)
class Picture:
    """A picture has image_HWC uint8 RGB and mask_HW float32 in [0, 1], where 1 is foreground."""

    image_HWC: NDArray[np.uint8]
    mask_HW: Array


@dataclass(frozen=True)
class Pair:
    """This is a generated picture, the reference it is compared with, and the label that is true of them.

    Attributes:
        family: "rendered" or "photographs".
        trap: an NM pair under one silhouette.
        area: mean of the generated picture's mask.
    """

    label: Label
    generated: Picture
    reference: Picture
    family: str = "rendered"
    trap: bool = False

    @property
    def area(self) -> float:
        return float(self.generated.mask_HW.mean())


def draw_pairs(
    seed: int,
    count: int,
    *,
    areas: tuple[float, float] = USUAL_AREAS,
    labels: Sequence[Label] = tuple(Label),
    size: int = SIZE,
) -> Iterator[Pair]:
    """Render `count` pairs of each label; the objects' areas are drawn log-uniformly from `areas`."""
    rng = np.random.default_rng([seed, 1])
    for _ in range(count):
        for label in labels:
            own, other = _object(rng, areas), _object(rng, areas)
            while own.texture == other.texture == "plain":
                other = _object(rng, areas)
            here, there = random_background(rng), random_background(rng)
            same_object, same_background = label in (Label.VM, Label.FM), label in (Label.VM, Label.BM)
            reference = Scene(own if same_object else other, here if same_background else there)
            yield Pair(label, Picture(*render(Scene(own, here), size)), Picture(*render(reference, size)))


def draw_traps(seed: int, count: int, *, areas: tuple[float, float], size: int = SIZE) -> Iterator[Pair]:
    """Render `count` pairs of unrelated content with one silhouette."""
    rng = np.random.default_rng([seed, 2])
    for _ in range(count):
        own = _object(rng, areas)
        generated = Picture(*render(Scene(own, random_background(rng)), size))
        inner = _dressed_anew(own, rng)
        reference = Picture(*render(Scene(inner, random_background(rng)), size))
        yield Pair(Label.NM, generated, reference, trap=True)


def draw_recoloured(seed: int, count: int, *, size: int = SIZE) -> Iterator[Pair]:
    """Render `count` FM pairs on new backgrounds.

    Their objects have the same shape, texture and shading in other colours.
    """
    rng = np.random.default_rng([seed, 3])
    for _ in range(count):
        own = _object(rng, USUAL_AREAS)
        while own.texture == "plain":
            own = _object(rng, USUAL_AREAS)
        turn = int(rng.integers(1, 3))  # channels rotated: a hue turned by a third or two thirds
        painted = replace(own, rgb=_rolled(own.rgb, turn), rgb2=_rolled(own.rgb2, turn))
        generated, reference = (Scene(thing, random_background(rng)) for thing in (own, painted))
        yield Pair(Label.FM, Picture(*render(generated, size)), Picture(*render(reference, size)))


def _rolled(rgb: tuple[float, float, float], turn: int) -> tuple[float, float, float]:
    return (rgb[-turn % 3], rgb[(1 - turn) % 3], rgb[(2 - turn) % 3])


def _dressed_anew(own: Object, rng: np.random.Generator) -> Object:
    """Another object's surface under this one's outline."""
    other = random_object(rng)
    while own.texture == other.texture == "plain":
        other = random_object(rng)
    return replace(
        own,
        colour=other.colour,
        texture=other.texture,
        rgb=other.rgb,
        rgb2=other.rgb2,
        light=other.light,
        texture_angle=other.texture_angle,
        wavelength=other.wavelength * own.radius / other.radius,
        phases=other.phases,
    )


def _object(rng: np.random.Generator, areas: tuple[float, float]) -> Object:
    """Return an object that fills a share of the image drawn from `areas`; its texture grows and shrinks with it."""
    drawn = random_object(rng)
    target = float(np.exp(rng.uniform(*np.log(areas))))
    if target > 0.4:  # what fills the image stands in its middle
        drawn = replace(drawn, centre=(0.5, 0.5), stretch=1.0)
    low, high = 0.0, _REACH
    while True:
        radius = (low + high) / 2
        found = _area(replace(drawn, radius=radius))
        if abs(found - target) <= _AREA_TOLERANCE * target or high - low < 1e-4:
            return replace(drawn, radius=radius, wavelength=drawn.wavelength * max(radius / drawn.radius, 0.5))
        low, high = (radius, high) if found < target else (low, radius)


def _area(thing: Object) -> float:
    nothing = random_background(np.random.default_rng(0))
    return float(render_layers(Scene(thing, nothing))[1].mean())
