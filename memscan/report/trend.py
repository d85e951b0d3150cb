"""This module makes the trend page: one panel of prompts over many checkpoints, as one static page without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from memscan.report.figures import round_up
from memscan.report.page import environment, read_part

LINES = ("memorised", "vm", "fm", "bm")
WIDTH, HEIGHT = 960.0, 220.0


def render_trend(name: str, baseline: str | None, records: Sequence[Mapping[str, Any]]) -> str:
    """Render the page.

    Args:
        name: of the nightly.
        baseline: name of the pinned checkpoint, if any.
        records: of all checkpoints, in order.

    Returns:
        A complete HTML document.
    """
    return (
        environment()
        .get_template("trend.html")
        .render(
            name=name,
            baseline=baseline,
            records=records,
            chart=chart(records),
            style=Markup(read_part("report.css")),
        )
    )


def chart(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return positions of the lines in drawing units: x by order, y by rate on one scale from 0 to a round share.

    Returns:
        "top": the scale's upper end; "lines": name -> points (x, y, low, high) in units; "ticks": (y, share).
    """
    ends = [record["figures"][line]["high"] for record in records for line in LINES]
    top = min(1.0, round_up(max([*ends, 0.01])))
    step = WIDTH / max(1, len(records))

    def height(share: float | None) -> float:
        return round(HEIGHT * (1 - min(1.0, (share or 0.0) / top)), 1)

    lines = {
        line: [
            {
                "x": round(step * (at + 0.5), 1),
                **{key: height(record["figures"][line][end]) for key, end in _ENDS.items()},
                "record": record,
                "rate": record["figures"][line]["rate"],
            }
            for at, record in enumerate(records)
        ]
        for line in LINES
    }
    return {
        "top": top,
        "lines": lines,
        "ticks": [(height(top * tick / 4), top * tick / 4) for tick in range(5)],
        "width": WIDTH,
        "height": HEIGHT,
    }


_ENDS = {"y": "rate", "low": "low", "high": "high"}
