"""This module writes the flagged list as the page's script reads it: columns of numbers and text in compact JSON.

50,000 prompts must open at once from a disk, so the rows are not HTML: the script makes the few that are shown.
Everything here is text that strangers wrote. It is never parsed as HTML: the script sets it as text, and `to_script`
writes no character that could end a script element.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from memscan.records import MEMORISED
from memscan.redaction import redact
from memscan.report.evidence import Exhibit

CAPTION = 300  # characters of a caption in the page
MATCHES = 24  # training images of a prompt in the page
_ROUND = {"severity": 3, "share": 3, "margin": 3, "foreground": 3, "background": 3, "noise_norm": 4, "agreement": 3}
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def columns(flagged: pa.Table, exhibits: Sequence[Exhibit]) -> dict[str, Any]:
    """Return the page's data: one list per column, text that repeats as a number into `references` and `sources`."""
    references, sources = _Names(), _Names()
    urls: dict[int, str | None] = {}
    data: dict[str, Any] = {
        "id": flagged["prompt_id"].to_pylist(),
        "caption": [_cut(one) for one in flagged["caption"].to_pylist()],
        "label": [MEMORISED.index(one) for one in flagged["label"].to_pylist()],
        **{name: _rounded(flagged, name, digits) for name, digits in _ROUND.items()},
        **{name: flagged[name].to_pylist() for name in ("count", "samples", "reach", "cluster", "component", "row")},
        "source": [sources.of(one) for one in flagged["source"].to_pylist()],
    }
    matches, groups = [], []
    names = ("match_ids", "match_groups", "match_urls")
    for ids, own_groups, own_urls in zip(*(flagged[name].to_pylist() for name in names), strict=True):
        matches.append([references.of(one) for one in ids[:MATCHES]])
        groups.append([references.of(one) for one in own_groups[:MATCHES]])
        urls.update(zip(matches[-1], own_urls, strict=False))
    signals = flagged["signals"].to_pylist()
    if any(signals):
        data["signals"] = [{name: _short(value) for name, value in one} for one in signals]
    known = [shown_url(urls.get(number)) for number in range(len(references.names))]
    return {
        **data,
        "matches": matches,
        "groups": groups,
        "matched": [len(ids) for ids in flagged["match_ids"].to_pylist()],
        "references": references.names,
        "urls": known,
        "linked": [int(link(url) is not None) for url in known],
        "sources": [_shown_source(one) for one in sources.names],
        "evidence": {str(one.row["prompt_id"]): _evidence(one) for one in exhibits if one.generation},
    }


def shown_url(url: str | None) -> str | None:
    """Return the URL as the report shows it: reports are passed on, so a signature or password in it is not."""
    return redact(url) if url else url


def link(url: str | None) -> str | None:
    """Return the URL if it is safe to follow: http or https with a host; anything else is shown as text only."""
    if not url:
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return url if parts.scheme in ("http", "https") and parts.netloc else None


def to_script(value: Any) -> str:
    """Return JSON for a script element that is data.

    It contains no <, > or &, so that no text in it can end the element or begin another.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _shown_source(path: str) -> str:
    """Return a prompt file as it was named; of an absolute path only the end, which is what a reader can use."""
    parts = path.split("/")
    return "/".join(["\u2026", *parts[-2:]]) if path.startswith("/") and len(parts) > 3 else path


def _evidence(exhibit: Exhibit) -> dict[str, Any]:
    generation: Mapping[str, Any] = exhibit.generation
    found = {name: generation.get(name) for name in ("sample", "match_id")}
    found["seed"] = str(generation.get("seed"))  # beyond what a JavaScript number holds exactly
    found["similarity"] = _short(generation.get("similarity"))
    found["labels"] = list(exhibit.labels)
    found["generations"] = [
        {
            **{name: one.generation.get(name) for name in ("sample", "label", "match_id")},
            **{name: _short(one.generation.get(name)) for name in ("foreground", "background")},
        }
        for one in exhibit.pairs
    ]
    found["copied"] = list(generation.get("copied") or [])
    found["terms"] = {name: _short(value) for name, value in generation.get("terms") or []}
    if len(str(exhibit.row["caption"])) > CAPTION:
        found["caption"] = exhibit.row["caption"]
    if exhibit.match and exhibit.match.caption and exhibit.match.caption != exhibit.row["caption"]:
        found["match_caption"] = _cut(exhibit.match.caption)
    return found


class _Names:
    """Distinct texts, numbered as they come."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def of(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]


def _rounded(flagged: pa.Table, name: str, digits: int) -> list[float | None]:
    return [None if one is None else round(one, digits) for one in flagged[name].to_pylist()]


def _short(value: float | None) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.4g}")


def _cut(text: str) -> str:
    return text if len(text) <= CAPTION else text[: CAPTION - 1] + "\u2026"
