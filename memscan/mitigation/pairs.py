"""This module chooses pairs of image and caption for a fine-tuning: every image once, none that is to be unlearned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any


def distinct_pairs(
    rows: Iterable[int],
    stored: Callable[[int], Mapping[str, Any]],
    most: int,
    *,
    without_ids: Collection[str] = (),
    without_captions: Collection[str] = (),
) -> list[tuple[int, str]]:
    """Return rows with their captions in the given order, at most `most` of them.

    An image that is in several rows is taken once, by the bytes it is stored as (or by its path, where an index
    names its images instead of holding them); rows without a caption are left out.

    Args:
        stored: a row's "reference_id", "caption", "image" and "path" (`ReferenceStore.encoded`).
        without_ids, without_captions: references and captions that must not be trained on.
    """
    seen: set[bytes] = set()
    chosen: list[tuple[int, str]] = []
    for row in rows:
        if len(chosen) == most:
            break
        one = stored(row)
        digest = hashlib.sha256(one["image"] or str(one["path"]).encode()).digest()
        if not one["caption"] or digest in seen:
            continue
        seen.add(digest)
        if one["reference_id"] not in without_ids and one["caption"] not in without_captions:
            chosen.append((row, str(one["caption"])))
    return chosen
