"""A prompt as a vector: its text, the training images it reaches, and both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 64
WORD_SIZE = 64
_WORD = re.compile(r"[^\W_]{2,}", re.UNICODE)

Vectors = npt.NDArray[np.float32]


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case: runs of two or more letters or digits of any script."""
    return _WORD.findall(caption.casefold())


def unit(vectors_ND: npt.NDArray[np.floating], centred: bool = False) -> Vectors:
    """Rows at length 1 (zero rows stay zero), after taking the mean row off if asked for.

    Text encoders put all captions into a narrow cone; without their mean, what differs decides.
    """
    rows = vectors_ND.astype(np.float64)
    if centred and len(rows) > 2:
        rows = rows - rows.mean(axis=0, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 1e-12), dtype=np.float32)


def image_vectors(groups: Sequence[Sequence[str]], counts: Sequence[Sequence[int]]) -> Vectors:
    """Unit vectors (N, `IMAGE_SIZE`) whose cosine estimates that of the prompts' counts over training images.

    Every image is a random direction that follows from its id alone, so the result depends on no order. Prompts without
    an image in common are at right angles, give or take 1 / sqrt(`IMAGE_SIZE`).
    """
    directions = {name: _direction(name) for row in groups for name in row}
    rows = np.zeros((len(groups), IMAGE_SIZE), np.float64)
    for row, names, weights in zip(rows, groups, counts, strict=True):
        for name, weight in zip(names, weights, strict=True):
            row += weight * directions[name]
    return unit(rows)


def joined(text_ND: Vectors, images_ND: Vectors, weight: float) -> Vectors:
    """Unit vectors (N, D + E): cosines of text and of images, averaged with `weight` for the images."""
    return unit(np.concatenate([np.sqrt(1 - weight) * text_ND, np.sqrt(weight) * images_ND], axis=1))


def word_vectors(captions: Sequence[str]) -> Vectors:
    """Vectors (N, at most `WORD_SIZE`) from words and pairs of words alone (TF-IDF, truncated SVD): no model needed."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    order = sorted(range(len(captions)), key=lambda row: captions[row])
    vectorizer = TfidfVectorizer(analyzer=_terms, sublinear_tf=True, dtype=np.float64)
    if not any(words_of(caption) for caption in captions):
        return np.zeros((len(captions), 1), np.float32)
    counts = vectorizer.fit_transform([captions[row] for row in order])
    size = min(WORD_SIZE, min(counts.shape) - 1)
    dense = counts.toarray() if size < 2 else TruncatedSVD(size, random_state=0).fit_transform(counts)
    found = np.empty(dense.shape, np.float32)
    found[order] = dense
    return found


def _terms(caption: str) -> list[str]:
    words = words_of(caption)
    return [*words, *(f"{one} {other}" for one, other in pairwise(words))]


def _direction(name: str) -> npt.NDArray[np.float64]:
    seed = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    drawn = np.random.default_rng(seed).normal(size=IMAGE_SIZE)
    return np.asarray(drawn / np.linalg.norm(drawn), dtype=np.float64)
