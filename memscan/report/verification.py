"""The verification page: every repair of one run in one table, with pictures before and after.

Static, without scripts; captions and names are hostile text, which the template escapes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from memscan.census import LABELS
from memscan.images import thumbnail_jpeg
from memscan.report import words
from memscan.report.page import environment, read_part

_SIDE = 160
PANELS = {
    "flagged": "Flagged prompts",
    "paraphrases": "Paraphrases of them, by templates that no repair used",
    "ordinary": "Ordinary prompts of the half that no repair has seen",
}
Pictures = npt.NDArray[np.uint8]


def render_verification(
    results: Sequence[Mapping[str, Any]], before_KHWC: Pictures, after: Mapping[str, Pictures]
) -> str:
    """Render the page.

    Args:
        results: contents of verify.json, one a repair.
        before_KHWC: one generation of each pictured prompt by the original.
        after: the same generations by each repair, by its name.

    Returns:
        A complete HTML document.
    """
    return (
        environment()
        .get_template("verification.html")
        .render(
            results=results,
            panels=PANELS,
            labels=[*LABELS, "memorised"],
            label_words=words.LABELS,
            rows=_rows(results, before_KHWC, after),
            style=Markup(read_part("report.css")),
        )
    )


def _rows(
    results: Sequence[Mapping[str, Any]], before_KHWC: Pictures, after: Mapping[str, Pictures]
) -> list[dict[str, Any]]:
    """A row of pictures for each prompt: caption, original, and each repair in the order of the results."""
    captions = results[0]["captions"] if results else []
    return [
        {
            "caption": caption,
            "before": _picture(before_KHWC[at]),
            "after": [(result["name"], _picture(after[result["name"]][at])) for result in results],
        }
        for at, caption in enumerate(captions[: len(before_KHWC)])
    ]


def _picture(image_HWC: Pictures) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail_jpeg(image_HWC, _SIDE)).decode()}"
