"""This module scales vectors to unit length, as every search by cosine similarity needs them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def unit_rows(vectors_ND: npt.ArrayLike) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Scale each row to unit length.

    Returns:
        The rows (N, D), float32, those that cannot be scaled as zeros; and which rows could be: finite and not zero.
    """
    vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    good = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
    return np.where(good[:, None], vectors / np.where(good[:, None], norms, 1), 0).astype(np.float32), good
