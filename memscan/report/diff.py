"""The page of a difference between two runs: static, without scripts; captions are hostile text and escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from memscan.census.diff import KINDS
from memscan.report import words
from memscan.report.page import environment, read_part

SHOWN = 200


def render_diff(document: Mapping[str, Any], changes: pa.Table) -> str:
    """Render the page.

    Args:
        document: the content of `diff.json`.
        changes: `records.CHANGES`; the first `SHOWN` of each kind are in the page.

    Returns:
        A complete HTML document.
    """
    rows = {kind: changes.filter(pc.equal(changes["change"], kind)) for kind in KINDS}
    return (
        environment()
        .get_template("diff.html")
        .render(
            document=document,
            kinds=KINDS,
            rows={kind: table.slice(0, SHOWN).to_pylist() for kind, table in rows.items()},
            label_words=words.LABELS,
            style=Markup(read_part("report.css")),
        )
    )
