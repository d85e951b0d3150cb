"""The page: figures and exhibits in, one HTML string out.

Captions, ids, URLs and configuration are hostile text. The template escapes everything (jinja2 autoescape), links only
http(s) addresses, isolates writing directions, and forbids by its content security policy every request and every
script but its own, which is named by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from memscan import images
from memscan.census import LABELS, MEMORISED
from memscan.errors import RowReject
from memscan.report import figures, words
from memscan.report.evidence import Exhibit

Images = Literal["show", "blur", "none"]
MAX_EXHIBITS = 500
_REGIONS = ("foreground", "background")
_SIDE = 192  # pixels; shown at 132 CSS pixels, so still crisp on a dense display
_MASK_SIDE = 96
_TEMPLATES = Path(__file__).parent


def render_report(census: Mapping[str, Any], exhibits: Sequence[Exhibit], *, show: Images = "show") -> str:
    """Render the report.

    Args:
        census: the content of `census.json`.
        exhibits: the flagged prompts to show, worst first; at most `MAX_EXHIBITS` are.
        show: "blur" blurs the images until they are pointed at (they are still in the file), "none" leaves them out.

    Returns:
        A complete HTML document.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent, share=words.share, number=words.number, score=words.score, interval=words.interval
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = exhibits[:MAX_EXHIBITS]
    cards = [_card(number, exhibit, census["method"], show) for number, exhibit in enumerate(shown, 1)]
    unreadable = sum(card["unreadable"] for card in cards)
    return environment.get_template("report.html").render(
        census=census,
        labels=LABELS,
        memorised=MEMORISED,
        label_words=words.LABELS,
        reason_words=words.REASONS,
        notices=words.notices(census, unreadable),
        headline=words.headline(census),
        rule=words.rule(census["method"]["verdict"]),
        mix_bar=figures.mix_bar(census["prompts"]),
        generation_bar=figures.mix_bar(census["generations"]),
        ruler=figures.ruler(census),
        reach=figures.reach(census["one_to_many"]["histogram"]),
        cards=cards,
        label_counts={label: sum(one.row["label"] == label for one in shown) for label in MEMORISED},
        show=show,
        configuration=yaml.safe_dump(census["run"]["config"], sort_keys=False, allow_unicode=True),
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _card(number: int, exhibit: Exhibit, method: Mapping[str, Any], show: Images) -> dict[str, Any]:
    row, match = exhibit.row, exhibit.match
    match_ids, match_urls = row["match_ids"], row["match_urls"]
    best_match = exhibit.generation.get("match_id", match_ids[0])
    position = match_ids.index(best_match) if best_match in match_ids else 0
    sources = {
        "image": (_picture, exhibit.image),
        "mask": (_mask, exhibit.mask),
        "reference_image": (_picture, match.image if match else None),
        "reference_mask": (_mask, match.mask if match else None),
    }
    pictures = {name: draw(data) if show != "none" and data else None for name, (draw, data) in sources.items()}
    unreadable = sum(1 for name, (_, data) in sources.items() if data and show != "none" and not pictures[name])
    return {
        **pictures,
        "unreadable": unreadable,
        "number": number,
        "row": row,
        "generation": exhibit.generation,
        "labels": exhibit.labels,
        "match": {
            "id": best_match,
            "url": match_urls[position],
            "link": _link(match_urls[position]),
            "caption": match.caption if match else None,
            "others": [
                {"id": one, "url": url, "link": _link(url)}
                for one, url in zip(match_ids, match_urls, strict=True)
                if one != best_match
            ],
        },
        "bars": [figures.score_bar(region, row[region], method["thresholds"][region]) for region in _REGIONS],
        "search": json.dumps([row["caption"], row["prompt_id"], *match_ids], ensure_ascii=False).casefold(),
    }


def _link(url: str | None) -> str | None:
    """The URL if it is safe to follow: http or https with a host; anything else is shown as text only."""
    if not url:
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return url if parts.scheme in ("http", "https") and parts.netloc else None


@functools.lru_cache(maxsize=64)  # many prompts match one training image
def _picture(data: bytes) -> str | None:
    """A small picture as a data URI; None where the bytes are no image, which the page counts and says."""
    try:
        small = images.thumbnail_jpeg(images.decode(data), _SIDE)
    except RowReject:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"


@functools.lru_cache(maxsize=64)
def _mask(data: bytes) -> str | None:
    try:
        mask_HW = images.decode_mask(data)
    except RowReject:
        return None
    step = max(1, -(-max(mask_HW.shape) // _MASK_SIDE))
    small = images.encode_mask(mask_HW[::step, ::step])
    return f"data:image/png;base64,{base64.b64encode(small).decode()}"
