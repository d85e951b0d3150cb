"""This module makes vectors of prompts from their text and from the training images that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, diags_array

WORD_SIZE = 64
STEPS = 10  # of propagation; at a weight of 0.75 what is left out is under a sixteenth
_WORD = re.compile(r"[^\W_]{2,}", re.UNICODE)

Vectors = npt.NDArray[np.float32]


def words_of(caption: str) -> list[str]:
    """Return the words of a caption in lower case: runs of two or more letters or digits of any script."""
    return _WORD.findall(caption.casefold())


def unit(vectors_ND: npt.NDArray[np.floating], centred: bool = False) -> Vectors:
    """Scale rows to length 1 (zero rows stay zero), and subtract the mean row before if asked for.

    Text encoders put all captions into a narrow cone. Without the mean, the differences between captions decide.
    """
    rows = vectors_ND.astype(np.float64)
    if centred and len(rows) > 2:
        rows = rows - rows.mean(axis=0, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 1e-12), dtype=np.float32)


def drawn_together(
    text_ND: Vectors, groups: Sequence[Sequence[str]], counts: Sequence[Sequence[int]], weight: float
) -> Vectors:
    """Move text vectors towards those of the prompts that reach the same training images; returns unit rows (N, D).

    Every step, a prompt goes from its own text the part `weight` of the way to the mean over its images (by how many
    generations match each) of the mean of all prompts that reach the image: personalised propagation over the bipartite
    graph (Gasteiger et al. 2019, equation 4). Sharing an image is a reason to stand together, also by way of a third
    prompt; sharing none is no reason to stand apart; and an image that everything reaches moves nothing, for its mean
    is the centre.

    Args:
        text_ND: centred unit rows.
        groups, counts: by prompt, the images that it reaches and how many generations match each.
    """
    nodes = {name: place for place, name in enumerate(sorted({name for row in groups for name in row}))}
    if not nodes or weight == 0:
        return text_ND
    first = np.repeat(np.arange(len(groups)), [len(row) for row in groups])
    second = np.array([nodes[name] for row in groups for name in row], np.int64)
    value = np.array([count for row in counts for count in row], np.float64)
    edges_NG = csr_array((value, (first, second)), shape=(len(groups), len(nodes)))
    by_image_GN = _means(csr_array(edges_NG.T))
    by_prompt_NG, alone_N = _means(edges_NG), np.diff(edges_NG.indptr) == 0
    moved_ND = text_ND.astype(np.float64)
    for _ in range(STEPS):
        met_ND = by_prompt_NG @ (by_image_GN @ moved_ND)
        moved_ND = np.where(alone_N[:, None], text_ND, (1 - weight) * text_ND + weight * met_ND)
    return unit(moved_ND)


def _means(edges: csr_array) -> csr_array:
    total = np.asarray(edges.sum(axis=1)).ravel()
    return csr_array(diags_array(np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)) @ edges)


def word_vectors(captions: Sequence[str]) -> Vectors:
    """Return vectors (N, at most `WORD_SIZE`) of words and pairs of words by TF-IDF and truncated SVD."""
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
