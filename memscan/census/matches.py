"""This module finds the training images that a prompt's memorised generations reach.

A generation *matches* the one candidate that decided its label. Other candidates may be above a threshold too, for
example every training image that shows the memorised object. They are not matches and count in no rate. But prompts
that share them belong together, even if each matches another image (one object in front of many backgrounds).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from memscan.records import Label

ALIKE = 32  # at most so many of them stand in a flagged list


def matched(generations: Sequence[Mapping[str, Any]], first: str) -> dict[str, int]:
    """Return the distinct matches of the memorised generations, and how many generations match each.

    The most frequent comes first; ties go to `first`, then by id.

    Args:
        generations: rows of `records.GENERATION`; those with the label NM do not count.
    """
    counts = Counter(str(one["match_id"]) for one in generations if one["label"] != Label.NM.value)
    order = sorted(counts, key=lambda match: (-counts[match], match != first, match))
    return {match: counts[match] for match in order}


def alike(generations: Sequence[Mapping[str, Any]], matches: Mapping[str, int]) -> list[str]:
    """Return further training images at or above a threshold for a memorised generation.

    The image of most generations comes first, then they are sorted by id.

    Args:
        generations: their `candidates` need `reference_id` and `label`; without candidates there is nothing to find.
        matches: left out.
    """
    counts = Counter(
        str(candidate["reference_id"])
        for one in generations
        if one["label"] != Label.NM.value
        for candidate in one.get("candidates") or ()
        if candidate["label"] != Label.NM.value
    )
    return sorted(counts.keys() - matches.keys(), key=lambda one: (-counts[one], one))[:ALIKE]
