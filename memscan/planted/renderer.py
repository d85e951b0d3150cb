"""This module draws procedural images with exact foreground masks for the planted world.

A scene is one object (a closed outline r(theta) with a textured, shaded body and a dark rim) before one background
(a soft pattern). Every parameter that a caption does not name (position, size, rotation, phase, light, exact hue)
is free, so that two images of one caption differ as two photographs of one subject do. Edges are anti-aliased and
wavelengths stay above seven pixels: what is drawn can survive an autoencoder with eight-fold downsampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SIZE = 64

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.95, 0.55, 0.12),
    "yellow": (0.95, 0.86, 0.25),
    "green": (0.20, 0.62, 0.24),
    "teal": (0.10, 0.60, 0.60),
    "blue": (0.17, 0.35, 0.85),
    "purple": (0.52, 0.22, 0.72),
    "pink": (0.95, 0.55, 0.72),
    "brown": (0.50, 0.32, 0.18),
    "white": (0.93, 0.93, 0.91),
    "black": (0.13, 0.13, 0.15),
    "grey": (0.55, 0.56, 0.58),
}


def _regular(corners: int, sharpness: float) -> Callable[[Array], Array]:
    """Outline of a regular polygon, rounded by `sharpness` < 1 (1 is the exact polygon)."""

    def outline(theta: Array) -> Array:
        wedge = 2 * np.pi / corners
        local = np.mod(theta, wedge) - wedge / 2
        polygon = np.cos(wedge / 2) / np.cos(local)
        return np.asarray(1 - sharpness + sharpness * polygon / np.cos(wedge / 2) * 0.85, np.float32)

    return outline


def _petals(count: int, depth: float, power: float = 1.0) -> Callable[[Array], Array]:
    def outline(theta: Array) -> Array:
        wave = np.cos(count * theta)
        return np.asarray(1 + depth * np.sign(wave) * np.abs(wave) ** power, np.float32)

    return outline


def _egg(theta: Array) -> Array:
    return np.asarray(0.82 + 0.28 * np.abs(np.sin(theta)) + 0.10 * np.sin(theta), np.float32)


def _heart(theta: Array) -> Array:
    turned = theta + np.pi / 2
    return np.asarray(0.72 + 0.42 * np.abs(np.sin(turned / 2)) ** 0.6 - 0.12 * np.cos(2 * turned), np.float32)


def _leaf(theta: Array) -> Array:
    return np.asarray(0.55 + 0.75 * np.abs(np.cos(theta)) ** 1.6, np.float32)


SHAPES: dict[str, Callable[[Array], Array]] = {
    "disc": lambda theta: np.ones_like(theta),
    "egg": _egg,
    "tile": _regular(4, 0.9),
    "wedge": _regular(3, 0.85),
    "star": _petals(5, 0.32, 0.8),
    "flower": _petals(6, 0.20),
    "gear": _petals(9, 0.12, 0.35),
    "heart": _heart,
    "leaf": _leaf,
    "clover": _petals(3, 0.30),
    "cross": _petals(4, 0.30, 0.6),
    "bean": _petals(2, 0.28),
}
TEXTURES = ("plain", "striped", "spotted", "banded", "patched")
PATTERNS = ("striped", "checkered", "dotted", "wavy", "ringed", "cloudy", "hilly", "marbled")


@dataclass(frozen=True)
class Object:
    """This is a foreground object. Lengths are shares of the image side, and angles are in radians."""

    shape: str
    colour: str
    texture: str
    rgb: tuple[float, float, float]
    rgb2: tuple[float, float, float]
    centre: tuple[float, float]
    radius: float
    angle: float
    stretch: float
    light: float
    texture_angle: float
    wavelength: float
    phases: tuple[float, ...]


@dataclass(frozen=True)
class Background:
    """This is what is behind the object. Lengths are shares of the image side, and angles are in radians."""

    pattern: str
    colour: str
    rgb: tuple[float, float, float]
    rgb2: tuple[float, float, float]
    angle: float
    wavelength: float
    phases: tuple[float, ...]
    light: float


@dataclass(frozen=True)
class Scene:
    object: Object
    background: Background


def random_object(rng: np.random.Generator, shape: str | None = None, colour: str | None = None) -> Object:
    """Draw an object; `shape` and `colour` fix what a caption names. Its area is about 18 to 45 % of the image."""
    colour = colour or str(rng.choice(list(COLOURS)))
    rgb = _jitter(rng, COLOURS[colour], 0.06)
    contrast = 0.45 if sum(rgb) < 1.5 else -0.45
    accent = COLOURS[str(rng.choice(list(COLOURS)))]
    rgb2 = tuple(float(np.clip(0.55 * (c + contrast) + 0.45 * a, 0, 1)) for c, a in zip(rgb, accent, strict=True))
    return Object(
        shape=shape or str(rng.choice(list(SHAPES))),
        colour=colour,
        texture=str(rng.choice(TEXTURES, p=(0.12, 0.22, 0.22, 0.22, 0.22))),
        rgb=rgb,
        rgb2=(rgb2[0], rgb2[1], rgb2[2]),
        centre=(float(rng.uniform(0.36, 0.64)), float(rng.uniform(0.36, 0.64))),
        radius=float(rng.uniform(0.25, 0.36)),
        angle=float(rng.uniform(-np.pi, np.pi)),
        stretch=float(rng.uniform(0.8, 1.25)),
        light=float(rng.uniform(-np.pi, np.pi)),
        texture_angle=float(rng.uniform(-np.pi, np.pi)),
        wavelength=float(rng.uniform(0.15, 0.28)),
        phases=tuple(float(p) for p in rng.uniform(0, 2 * np.pi, 8)),
    )


def random_background(rng: np.random.Generator, pattern: str | None = None, colour: str | None = None) -> Background:
    """Draw a background; `pattern` and `colour` fix what a caption names."""
    colour = colour or str(rng.choice(list(COLOURS)))
    rgb = _jitter(rng, COLOURS[colour], 0.05)
    partner = _jitter(rng, COLOURS[str(rng.choice(list(COLOURS)))], 0.05)
    shift = 0.30 if sum(rgb) < 1.5 else -0.30
    rgb2 = tuple(float(np.clip(0.6 * (c + shift) + 0.4 * p, 0, 1)) for c, p in zip(rgb, partner, strict=True))
    return Background(
        pattern=pattern or str(rng.choice(PATTERNS)),
        colour=colour,
        rgb=rgb,
        rgb2=(rgb2[0], rgb2[1], rgb2[2]),
        angle=float(rng.uniform(-np.pi, np.pi)),
        wavelength=float(rng.uniform(0.2, 0.42)),
        phases=tuple(float(p) for p in rng.uniform(0, 2 * np.pi, 12)),
        light=float(rng.uniform(-np.pi, np.pi)),
    )


def render(scene: Scene, size: int = SIZE) -> tuple[NDArray[np.uint8], Array]:
    """Draw a scene.

    Returns:
        image_HWC (uint8, RGB) and mask_HW (float32 in [0, 1], the object's exact coverage).
    """
    body_HWC, mask_HW, background_HWC = render_layers(scene, size)
    image_HWC = mask_HW[..., None] * body_HWC + (1 - mask_HW[..., None]) * background_HWC
    return np.asarray(np.rint(image_HWC * 255), np.uint8), mask_HW


def render_layers(scene: Scene, size: int = SIZE) -> tuple[Array, Array, Array]:
    """Return body_HWC (meaningful inside the mask), mask_HW and background_HWC, all float32 in [0, 1]."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    y_HW, x_HW = (np.asarray(grid, np.float32) for grid in np.meshgrid(axis, axis, indexing="ij"))
    background_HWC = _paint_background(scene.background, x_HW, y_HW)
    body_HWC, mask_HW = _paint_object(scene.object, x_HW, y_HW, size)
    return np.clip(body_HWC, 0, 1), mask_HW, np.clip(background_HWC, 0, 1)


def _jitter(rng: np.random.Generator, rgb: tuple[float, float, float], spread: float) -> tuple[float, float, float]:
    moved = np.clip(np.asarray(rgb) + rng.normal(0, spread, 3), 0.03, 0.97)
    return float(moved[0]), float(moved[1]), float(moved[2])


def _along(x: Array, y: Array, angle: float) -> Array:
    return np.asarray(np.cos(angle) * x + np.sin(angle) * y, np.float32)


def _smooth_field(x: Array, y: Array, phases: tuple[float, ...], scale: float) -> Array:
    """Return a sum of four plane waves with random directions, about unit variance."""
    total = np.zeros_like(x)
    for k in range(4):
        direction, phase = phases[k], phases[k + 4]
        total += np.sin(2 * np.pi * _along(x, y, direction) * (0.75 + 0.25 * k) / scale + phase)
    return np.asarray(total / np.sqrt(2.0), np.float32)


def _soft_step(value: Array, width: float) -> Array:
    return np.asarray(0.5 + 0.5 * np.tanh(value / width), np.float32)


def _pattern_weight(
    pattern: str, x: Array, y: Array, angle: float, wavelength: float, phases: tuple[float, ...]
) -> Array:
    """Return how much of the second colour shows, in [0, 1]."""
    k = 2 * np.pi / wavelength
    u, v = _along(x, y, angle), _along(x, y, angle + np.pi / 2)
    if pattern == "striped":
        return _soft_step(np.sin(k * u + phases[0]), 0.5)
    if pattern == "checkered":
        return _soft_step(np.sin(0.8 * k * u + phases[0]) * np.sin(0.8 * k * v + phases[1]), 0.3)
    if pattern in ("dotted", "spotted"):
        return _soft_step(np.sin(k * u + phases[0]) + np.sin(k * v + phases[1]) - 0.7, 0.4)
    if pattern == "wavy":
        return _soft_step(np.sin(k * u + phases[0] + 1.8 * np.sin(0.6 * k * v + phases[1])), 0.5)
    if pattern in ("ringed", "banded"):
        cx, cy = 0.5 + 0.3 * np.cos(phases[0]), 0.5 + 0.3 * np.sin(phases[0])
        return _soft_step(np.sin(k * np.hypot(x - cx, y - cy) + phases[1]), 0.5)
    if pattern in ("cloudy", "patched"):
        return _soft_step(_smooth_field(x, y, phases, 3.2 * wavelength), 0.7)
    if pattern == "hilly":
        ridge = 0.5 + 0.18 * np.cos(phases[0]) + 0.07 * np.sin(2.2 * np.pi * x + phases[1])
        second = ridge + 0.2 + 0.06 * np.sin(3.1 * np.pi * x + phases[2])
        return np.asarray(0.55 * _soft_step(y - ridge, 0.02) + 0.45 * _soft_step(y - second, 0.02), np.float32)
    if pattern == "marbled":
        return _soft_step(np.sin(0.7 * k * u + 1.6 * _smooth_field(x, y, phases, 3.5 * wavelength)), 0.6)
    raise ValueError(f"unknown pattern {pattern!r}")


def _paint_background(background: Background, x: Array, y: Array) -> Array:
    weight = _pattern_weight(background.pattern, x, y, background.angle, background.wavelength, background.phases)[
        ..., None
    ]
    colour = (1 - weight) * np.asarray(background.rgb, np.float32) + weight * np.asarray(background.rgb2, np.float32)
    shade = 1 + 0.25 * _along(x - 0.5, y - 0.5, background.light)
    return np.asarray(colour * shade[..., None], np.float32)


def _paint_object(thing: Object, x: Array, y: Array, size: int) -> tuple[Array, Array]:
    dx, dy = x - thing.centre[0], y - thing.centre[1]
    u = _along(dx, dy, thing.angle) / thing.stretch
    v = _along(dx, dy, thing.angle + np.pi / 2) * thing.stretch
    distance = np.hypot(u, v)
    edge = thing.radius * SHAPES[thing.shape](np.arctan2(v, u).astype(np.float32))
    inside_px = (edge - distance) * size  # signed, in pixels, positive inside
    mask = np.clip(inside_px + 0.5, 0, 1).astype(np.float32)

    if thing.texture == "plain":
        weight = np.zeros_like(x)
    else:
        local_x, local_y = dx + 0.5, dy + 0.5
        weight = _pattern_weight(thing.texture, local_x, local_y, thing.texture_angle, thing.wavelength, thing.phases)
    colour = (1 - weight[..., None]) * np.asarray(thing.rgb, np.float32) + weight[..., None] * np.asarray(
        thing.rgb2, np.float32
    )
    shade = 1 + 0.9 * _along(dx, dy, thing.light)
    rim = 0.35 + 0.65 * np.clip(inside_px / 2.5, 0, 1)
    return np.asarray(colour * (shade * rim)[..., None], np.float32), mask
