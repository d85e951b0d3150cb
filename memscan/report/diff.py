"""The page of a difference between two runs: static, without scripts; captions are hostile text and escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from memscan.census.diff import KINDS
from memscan.report import words
from memscan.report.evidence import Match
from memscan.report.page import Images, environment, read_part
from memscan.report.pictures import photograph

SHOWN = 200
PICTURED = 48  # prompts of each kind that are shown with pictures


@dataclass(frozen=True)
class Sides:
    """Pictures of one prompt that changed, encoded: a generation of each run, and the training images they match.

    A generation is None if there is none to show; `drawn` names the sides ("before", "after") whose generation was
    not kept by the scan and was generated again, by the same model from the same seed.
    """

    before: bytes | None = None
    after: bytes | None = None
    matches: Sequence[Match] = ()
    drawn: frozenset[str] = frozenset()


def render_diff(
    document: Mapping[str, Any],
    changes: pa.Table,
    sides: Mapping[str, Sides] | None = None,
    *,
    show: Images = "show",
) -> str:
    """Render the page.

    Args:
        document: the content of `diff.json`.
        changes: `records.CHANGES`; the first `SHOWN` of each kind are in the page.
        sides: prompt id -> its pictures, of the prompts that `pictured` names.
        show: "blur" blurs the pictures until they are pointed at, "none" leaves them out.

    Returns:
        A complete HTML document.
    """
    rows = {kind: changes.filter(pc.equal(changes["change"], kind)) for kind in KINDS}
    known = {} if show == "none" else sides or {}
    drawn = {kind: [_row(row, known) for row in _head(table)] for kind, table in rows.items()}
    return (
        environment()
        .get_template("diff.html")
        .render(
            document=document,
            kinds=KINDS,
            rows=drawn,
            lacking=any(
                figure["source"] is None and figure["label"] == "NM"
                for some in drawn.values()
                for row in some
                for figure in row["figures"]
            ),
            headline=headline(document),
            label_words=words.LABELS,
            show=show,
            style=Markup(read_part("report.css") + read_part("diff.css")),
        )
    )


def pictured(changes: pa.Table) -> list[dict[str, Any]]:
    """Return the rows that are shown with pictures: the first `PICTURED` of each kind."""
    return [
        row
        for kind in KINDS
        for row in changes.filter(pc.equal(changes["change"], kind)).slice(0, PICTURED).to_pylist()
    ]


def headline(document: Mapping[str, Any]) -> str:
    """Return in one sentence how the rate changed."""
    rate = document["rates"]["memorised"]
    before, after = words.percent(rate["before"]["rate"]), words.percent(rate["after"]["rate"])
    if rate["p_value"] >= 0.05:
        return f"No difference beyond chance: {before} of prompts memorised before, {after} after"
    way = "More" if rate["difference"] > 0 else "Less"
    return f"{way} is memorised: {before} of prompts before, {after} after"


def _head(table: pa.Table) -> list[dict[str, Any]]:
    return list(table.slice(0, SHOWN).to_pylist())


def _row(row: dict[str, Any], sides: Mapping[str, Sides]) -> dict[str, Any]:
    """Return a row with its figures: "name", "label", "source" (data URI or None), and "missing" (words instead)."""
    one = sides.get(row["prompt_id"])
    if one is None:
        return {**row, "figures": []}
    figures = []
    for side in ("before", "after"):
        data: bytes | None = getattr(one, side)
        source = photograph(data) if data else None
        label = row[f"label_{side}"]
        missing = "not kept, as it is not memorised" if not data and label == "NM" else "not available"
        name = f"{side}, drawn anew" if side in one.drawn else side
        figures.append({"name": name, "label": label, "source": source, "missing": missing})
    for match in one.matches:
        source = photograph(match.image) if match.image else None
        name = f"training image {match.reference_id}"
        figures.append({"name": name, "label": "", "source": source, "missing": "not available"})
    return {**row, "figures": figures}
