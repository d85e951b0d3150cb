"""This module decides which training images are near-duplicates and count as one.

A prompt that reaches five re-encoded, brightened or slightly shifted copies of one picture reaches one picture. Images
are compared as small thumbnails whose channels have mean and contrast removed, so that no model is needed and the
result does not depend on the run's embedder. First, nearest neighbours are found by a coarse thumbnail. Then the best
correlation over small shifts is computed on a finer thumbnail. Pairs above the threshold are joined, and their
connected components are the groups.

Two images that share only an object or only a background must stay apart: they are different training images to FB-Mem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from memscan.errors import RowReject
from memscan.io import images

SIDE = 32  # pixels of a thumbnail
THRESHOLD = 0.95  # correlation; chosen on planted world 2, see docs/clusters.md
_COARSE = 16
_CANDIDATE = 0.85  # of the coarse correlation: below it, no shift makes a pair near-duplicates
_NEIGHBOURS = 16
_SHIFT = 3  # thumbnail pixels: a tenth of the edge
_BLOCK = 4096

Thumbnail = npt.NDArray[np.uint8]


def thumbnail(data: bytes | None) -> Thumbnail | None:
    """Decode an image to (SIDE, SIDE, 3) uint8 without keeping its aspect; return None if it cannot be decoded."""
    if data is None:
        return None
    try:
        image_HWC = images.decode(data)
    except RowReject:
        return None
    small = Image.fromarray(image_HWC).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8)


def group_duplicates(thumbnails: Mapping[str, Thumbnail | None], threshold: float = THRESHOLD) -> dict[str, str]:
    """Return the group of every training image: the smallest id among its near-duplicates, or its own id.

    Args:
        thumbnails: by reference id; an image without one is a group of its own.
        threshold: correlation in (0, 1] from which two images are near-duplicates.
    """
    groups = {one: one for one in thumbnails}
    ids = sorted(one for one, small in thumbnails.items() if small is not None)
    if len(ids) < 2:
        return groups
    pixels_NHWC = np.stack([np.asarray(thumbnails[one]) for one in ids])
    first, second = _candidates(_normalised(_shrunk(pixels_NHWC)))
    near = _best_correlation(pixels_NHWC, first, second) >= threshold
    labels_N = components(len(ids), first[near], second[near])
    smallest: dict[int, str] = {}
    for one, label in zip(ids, labels_N.tolist(), strict=True):  # sorted, so the first of a component is its smallest
        groups[one] = smallest.setdefault(label, one)
    return groups


def components(
    count: int, first: npt.NDArray[np.integer[Any]], second: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.int64]:
    """Return the label (count,) of each node's connected component in the graph of edges first[i] - second[i]."""
    edges = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    labels: npt.NDArray[np.int64] = connected_components(edges, directed=False)[1].astype(np.int64)
    return labels


def members(groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the sorted ids of each group, by group."""
    found: dict[str, list[str]] = {}
    for one in sorted(groups):
        found.setdefault(groups[one], []).append(one)
    return found


def _shrunk(pixels_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    step = SIDE // _COARSE
    blocks = pixels_NHWC.reshape(len(pixels_NHWC), _COARSE, step, _COARSE, step, 3)
    return np.asarray(blocks.mean(axis=(2, 4)), dtype=np.float32)


def _normalised(pixels_NHWC: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Unit rows (N, H * W * C) with every channel's mean taken off; zero for a picture of one colour."""
    centred = pixels_NHWC.astype(np.float32) - pixels_NHWC.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    flat = centred.reshape(len(centred), -1)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(np.divide(flat, norm, out=np.zeros_like(flat), where=norm > 1e-3), dtype=np.float32)


def _candidates(coarse_ND: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs (i < j) whose coarse correlation is high, among each image's nearest neighbours."""
    import faiss

    index = faiss.IndexFlatIP(coarse_ND.shape[1])
    index.add(coarse_ND)
    similar, rows = index.search(coarse_ND, min(_NEIGHBOURS + 1, len(coarse_ND)))
    own = np.repeat(np.arange(len(coarse_ND))[:, None], rows.shape[1], axis=1)
    keep = (similar >= _CANDIDATE) & (rows != own) & (rows >= 0)
    pairs = np.sort(np.stack([own[keep], rows[keep]], axis=1), axis=1)
    unique = np.unique(pairs, axis=0)
    return unique[:, 0], unique[:, 1]


def _best_correlation(
    pixels_NHWC: npt.NDArray[np.uint8], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return the highest correlation of each pair over shifts of up to `_SHIFT` thumbnail pixels, in [-1, 1]."""
    best = np.full(len(first), -1.0, np.float32)
    for start in range(0, len(first), _BLOCK):
        part = slice(start, start + _BLOCK)
        one, other = pixels_NHWC[first[part]], pixels_NHWC[second[part]]
        for left, right in _overlaps(one, other):
            value = (_normalised(left) * _normalised(right)).sum(axis=1)
            best[part] = np.maximum(best[part], value)
    return best


def _overlaps(
    one_NHWC: npt.NDArray[np.uint8], other_NHWC: npt.NDArray[np.uint8]
) -> Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    for down in range(-_SHIFT, _SHIFT + 1):
        for right in range(-_SHIFT, _SHIFT + 1):
            yield one_NHWC[:, *_window(down, right)], other_NHWC[:, *_window(-down, -right)]


def _window(down: int, right: int) -> Sequence[slice]:
    return [slice(max(0, shift), SIDE + min(0, shift)) for shift in (down, right)]
