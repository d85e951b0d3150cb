"""This module computes the geometry of the report's inline drawings.

Numbers become positions in drawing units, and the template draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memscan.records import LABELS

WIDTH = 1000.0
SIDE = 320.0
_STEPS = (1, 2, 2.5, 5, 10)


def mix_bar(mix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the class mix as parts of one bar: label, x and width in [0, `WIDTH`].

    The most severe class comes first, and empty classes are left out.
    """
    parts, x = [], 0.0
    for label in LABELS:
        share = mix["classes"][label]["rate"] or 0.0
        if share > 0:
            parts.append({"label": label, "x": round(x, 2), "width": round(share * WIDTH, 2), "rate": share})
        x += share * WIDTH
    return parts


def ruler(census: Mapping[str, Any]) -> dict[str, Any]:
    """Return one scale for all interval drawings, and its ticks.

    It runs from 0 to a round share just above the largest upper end.
    """
    ends = [
        mix["classes"][label].get("clustered_high", mix["classes"][label]["high"])
        for mix in (census["prompts"], census["generations"])
        for label in LABELS[:-1]
    ]
    top = min(1.0, round_up(max([*ends, 0.01])))
    return {"top": top, "ticks": [top * tick / 4 for tick in range(5)]}


def round_up(value: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is at least `value` (> 0)."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))


def reach(histogram: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return bars: how many flagged prompts reach each number of training images; the last bar is for 20 and more."""
    counts: dict[int, int] = {}
    for images, prompts in histogram.items():
        counts[min(int(images), 20)] = counts.get(min(int(images), 20), 0) + prompts
    if not counts:
        return []
    tallest = max(counts.values())
    return [
        {
            "images": f"{images}+" if images == 20 else str(images),
            "prompts": counts.get(images, 0),
            "height": round(counts.get(images, 0) / tallest, 4),
        }
        for images in range(1, max(counts) + 1)
    ]


def shares(counts: Sequence[int]) -> list[float]:
    """Return counts as percentages of their sum."""
    total = sum(counts) or 1
    return [round(100 * count / total, 2) for count in counts]


def score_map(scores: Mapping[str, Any], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """Return all generations by foreground (across) and background (up) score, as squares in a drawing of 0 to `SIDE`.

    A cell's opacity grows with the logarithm of its count, so that one memorised generation among a million is seen.
    Its class is that of its middle under the thresholds, which may cut through a cell.
    """
    bins = scores["bins"]
    step = SIDE / bins
    top = max((count for *_, count in scores["cells"]), default=1)
    lines = {name: round(SIDE * thresholds[name], 2) for name in ("foreground", "background")}
    cells = []
    for x, y, count in scores["cells"]:
        over = [(place + 0.5) / bins >= thresholds[name] for place, name in ((x, "foreground"), (y, "background"))]
        cells.append(
            {
                "x": round(x * step, 2),
                "y": round(SIDE - (y + 1) * step, 2),
                "count": count,
                "label": {(True, True): "VM", (True, False): "FM", (False, True): "BM"}.get((over[0], over[1]), "NM"),
                "opacity": round(0.22 + 0.78 * math.log1p(count) / math.log1p(top), 3),
            }
        )
    return {"cells": cells, "size": round(step - 0.8, 2), "lines": lines, "side": SIDE}
