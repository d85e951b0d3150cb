"""This module cuts pairs out of photographs.

Outlines of the renderer are filled and surrounded with crops of real pictures.

The photographs are those that scikit-learn and scikit-image ship (the second where it is installed). They are split by
picture, so that thresholds chosen on one half say something about the other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from memscan.evaluation.pairs import USUAL_AREAS, Pair, Picture, draw_traps
from memscan.io import images
from memscan.planted.renderer import SIZE
from memscan.records import Label

Image = NDArray[np.uint8]

# Two halves, by picture: for calibration and for evaluation.
HALVES = (
    ("sklearn/datasets/images/china.jpg", "skimage/data/chelsea.png", "skimage/data/rocket.jpg"),
    (
        "sklearn/datasets/images/flower.jpg",
        "skimage/data/astronaut.png",
        "skimage/data/coffee.png",
        "skimage/data/motorcycle_left.png",
    ),
)
_CROPS = (0.25, 0.45)  # side of a crop, as a share of the photograph's smaller side
# Standard deviation of a crop's luminance after a blur is taken off, in [0, 1]. Skies and walls have less: two of them
# are alike without being copies, and a copy of one shows nothing.
_LEAST_DETAIL = 0.03
_CELLS = 4  # crops are told apart by the cell of this grid that their corner lies in


def installed(half: int) -> tuple[str, ...]:
    """Return the names of the photographs of a half that are here."""
    return tuple(name for name in HALVES[half] if _path(name) is not None)


def draw_photograph_pairs(
    seed: int, count: int, half: int, *, areas: tuple[float, float] = USUAL_AREAS, size: int = SIZE
) -> Iterator[Pair]:
    """Return `count` pairs of each label like those of `pairs.draw_pairs`, made of photographs."""
    rng = np.random.default_rng([seed, 4])
    outlines = (pair.generated.mask_HW for pair in draw_traps(seed + 1, 8 * count, areas=areas, size=size))
    for _ in range(count):
        for label in Label:
            mask, other_mask = next(outlines), next(outlines)
            inner, outer, other_inner, other_outer = _crops(rng, half, 4, size)
            same_object, same_background = label in (Label.VM, Label.FM), label in (Label.VM, Label.BM)
            generated = _pasted(inner, outer, mask)
            reference = _pasted(
                inner if same_object else other_inner,
                outer if same_background else other_outer,
                mask if same_object else other_mask,
            )
            yield Pair(label, generated, reference, family="photographs")


def draw_photograph_traps(
    seed: int, count: int, half: int, *, areas: tuple[float, float], size: int = SIZE
) -> Iterator[Pair]:
    """Return `count` pairs of unrelated photographs with one silhouette."""
    rng = np.random.default_rng([seed, 5])
    for outline in draw_traps(seed + 2, count, areas=areas, size=size):
        mask = outline.generated.mask_HW
        inner, outer, other_inner, other_outer = _crops(rng, half, 4, size)
        yield Pair(
            Label.NM,
            _pasted(inner, outer, mask),
            _pasted(other_inner, other_outer, mask),
            family="photographs",
            trap=True,
        )


def _pasted(inner: Image, outer: Image, mask_HW: NDArray[np.float32]) -> Picture:
    weight = mask_HW[..., None]
    return Picture(np.rint(weight * inner + (1 - weight) * outer).astype(np.uint8), mask_HW)


def _crops(rng: np.random.Generator, half: int, count: int, size: int) -> list[Image]:
    """Crops that do not overlap: of different photographs, or from opposite sides of one."""
    names = installed(half)
    crops: list[Image] = []
    taken: set[tuple[str, int, int]] = set()
    while len(crops) < count:
        name = str(rng.choice(names))
        whole = _photograph(name)
        side = int(rng.uniform(*_CROPS) * min(whole.shape[:2]))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in whole.shape[:2])
        cells = _cells(name, whole.shape[:2], top, left, side)
        crop = images.resize(whole[top : top + side, left : left + side], (size, size))
        if not cells & taken and _detail(crop) >= _LEAST_DETAIL:
            taken |= cells
            crops.append(crop)
    return crops


def _detail(crop_HWC: Image) -> float:
    grey_HW = crop_HWC.mean(axis=2) / 255
    return float((grey_HW - ndimage.gaussian_filter(grey_HW, crop_HWC.shape[0] / 8)).std())


def _cells(name: str, shape: Sequence[int], top: int, left: int, side: int) -> set[tuple[str, int, int]]:
    rows, columns = (
        range(int(_CELLS * start / extent), int(_CELLS * (start + side - 1) / extent) + 1)
        for start, extent in ((top, shape[0]), (left, shape[1]))
    )
    return {(name, row, column) for row in rows for column in columns}


@lru_cache(maxsize=16)
def _photograph(name: str) -> Image:
    path = _path(name)
    assert path is not None
    return images.decode(path.read_bytes())


def _path(name: str) -> Path | None:
    package, _, rest = name.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / rest
    return path if path.is_file() else None
