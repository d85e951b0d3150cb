"""This module corrupts copies: it moves, enlarges, recolours, compresses, blurs or partly hides them.

Each kind has several grades.

A corruption changes the generated picture of a pair and its mask, and keeps the label. Lengths are shares of the image
side, so that the grades mean the same at every size. The names of the grades are lengths in pixels of 64 px images.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy import ndimage

from memscan.evaluation.pairs import Pair, Picture
from memscan.planted.renderer import Scene, random_background, random_object, render

Rng = np.random.Generator


@dataclass(frozen=True)
class Corruption:
    """This is one kind of corruption at one grade.

    `apply(picture, grade, rng)` returns the corrupted picture.
    """

    kind: str
    grade: float
    unit: str
    work: Callable[[Picture, float, Rng], Picture]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.grade:g}{self.unit}"

    def apply(self, pair: Pair, seed: int) -> Pair:
        """Return the pair with its generated picture corrupted; the same seed corrupts it in the same way."""
        return replace(pair, generated=self.work(pair.generated, self.grade, np.random.default_rng(seed)))


def shift(picture: Picture, pixels: float, rng: Rng) -> Picture:
    """Move by `pixels` of 64 in a random direction; what comes in is mirrored."""
    angle = rng.uniform(0, 2 * np.pi)
    return _warp(picture, 1.0, (pixels / 64 * np.sin(angle), pixels / 64 * np.cos(angle)))


def scale(picture: Picture, percent: float, rng: Rng) -> Picture:
    """Enlarge (or reduce) by `percent` about the centre."""
    return _warp(picture, 1 + percent / 100, (0.0, 0.0))


def crop(picture: Picture, percent: float, rng: Rng) -> Picture:
    """Return a window of (100 - percent) % of the side, at a random place, enlarged to the image."""
    room = percent / 100
    zoom = 1 / (1 - room)
    return _warp(picture, zoom, tuple(zoom * float(rng.uniform(-room / 2, room / 2)) for _ in range(2)))


def hue(picture: Picture, degrees: float, rng: Rng) -> Picture:
    """Return all hues turned."""
    h, s, v = Image.fromarray(picture.image_HWC).convert("HSV").split()
    turned = Image.fromarray((np.asarray(h, np.int32) + round(degrees / 360 * 256)).astype(np.uint8))
    return replace(picture, image_HWC=np.asarray(Image.merge("HSV", (turned, s, v)).convert("RGB")))


def brightness(picture: Picture, percent: float, rng: Rng) -> Picture:
    """Make brighter or darker by a factor, clipped."""
    bright = ImageEnhance.Brightness(Image.fromarray(picture.image_HWC)).enhance(1 + percent / 100)
    return replace(picture, image_HWC=np.asarray(bright))


def jpeg(picture: Picture, quality: float, rng: Rng) -> Picture:
    """Compress at `quality`."""
    buffer = io.BytesIO()
    Image.fromarray(picture.image_HWC).save(buffer, "JPEG", quality=int(quality))
    return replace(picture, image_HWC=np.asarray(Image.open(buffer).convert("RGB")))


def blur(picture: Picture, sigma: float, rng: Rng) -> Picture:
    """Return a Gaussian blur of `sigma` pixels of 64."""
    spread = sigma * picture.image_HWC.shape[0] / 64
    soft = ndimage.gaussian_filter(picture.image_HWC.astype(np.float32), (spread, spread, 0), mode="mirror")
    return replace(picture, image_HWC=np.rint(soft).astype(np.uint8))


def occlusion(picture: Picture, percent: float, rng: Rng) -> Picture:
    """Return a patterned bar that hides `percent` of the foreground; what it hides is not foreground any more."""
    mask = picture.mask_HW
    y, x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    inside = np.sort(along[mask > 0.5])
    if inside.size == 0:
        return picture
    start = rng.uniform(0, 1 - percent / 100)
    low, high = np.quantile(inside, [start, start + percent / 100])
    bar = (along >= low) & (along <= high)
    cover, _ = render(Scene(random_object(rng), random_background(rng)), mask.shape[0])
    return Picture(np.where(bar[..., None], cover, picture.image_HWC), np.where(bar, 0, mask).astype(np.float32))


def _warp(picture: Picture, zoom: float, move: tuple[float, ...]) -> Picture:
    """Enlarged by `zoom` about the centre, then moved by `move` (rows, columns; shares of the side)."""
    side = picture.image_HWC.shape[0]
    centre = (side - 1) / 2
    offset = [centre - (centre + side * part) / zoom for part in move]

    def warp(plane_HW: NDArray[np.float32]) -> NDArray[np.float32]:
        moved = ndimage.affine_transform(plane_HW, [1 / zoom, 1 / zoom], offset, order=3, mode="mirror")
        return np.asarray(moved, np.float32)

    planes = [warp(picture.image_HWC[..., c].astype(np.float32)) for c in range(3)]
    image_HWC = np.rint(np.clip(np.stack(planes, axis=2), 0, 255)).astype(np.uint8)
    return Picture(image_HWC, np.clip(warp(picture.mask_HW), 0, 1))


def _graded(kind: str, unit: str, work: Callable[[Picture, float, Rng], Picture], *grades: float) -> list[Corruption]:
    return [Corruption(kind, grade, unit, work) for grade in grades]


CORRUPTIONS: tuple[Corruption, ...] = (
    *_graded("shift", " px", shift, 1, 2, 4, 8),
    *_graded("scale", " %", scale, -10, -5, 5, 10),
    *_graded("crop", " %", crop, 5, 10),
    *_graded("hue", "°", hue, 30, 90, 180),
    *_graded("brightness", " %", brightness, -40, -20, 20, 40),
    *_graded("jpeg", "", jpeg, 90, 60, 30),
    *_graded("blur", " px", blur, 0.5, 1, 1.5),
    *_graded("occlusion", " %", occlusion, 10, 20, 30),
)
