"""This module makes the trend page: one panel of prompts over many checkpoints, as one static page without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from memscan.census.policy import PolicyConfig
from memscan.report import words
from memscan.report.figures import round_up
from memscan.report.page import environment, read_part

LINES = ("memorised", "vm", "fm", "bm")
WIDTH, HEIGHT = 960.0, 220.0
# So many names fit below the axis, aslant; of more checkpoints every second, third ... name is written, and the last.
NAMED = 30
_NAME = 20  # characters of a name below the axis; the table has all of it
# A limit that lies further above the data than this would press them flat: it is said in words instead.
_FAR = 6.0
# Rules that are drawn as lines: name of the limit -> the series that it bounds.
_RATE_LIMITS = {"max_vm_rate": "vm", "max_memorised_rate": "memorised"}
NAMES = {
    "max_vm_rate": "VM rate",
    "max_memorised_rate": "memorised rate",
    "max_severity": "severity",
    "max_rejected_rate": "not processed",
    "max_new_flagged": "newly flagged",
    "max_severity_increase": "severity increase",
}
_SHARES = ("max_vm_rate", "max_memorised_rate", "max_rejected_rate")
_SERIES = {"memorised": "memorised", "vm": "VM", "fm": "FM", "bm": "BM", "severity": "severity"}


def render_trend(
    name: str,
    baseline: str | None,
    records: Sequence[Mapping[str, Any]],
    policy: PolicyConfig | None = None,
    diffs: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Render the page.

    Args:
        name: of the nightly.
        baseline: name of the pinned checkpoint, if any.
        records: of all checkpoints, in order.
        policy: whose limits are drawn; none without it.
        diffs: (slug of a checkpoint, "previous" or "baseline") -> address of the page of that pair, as seen from the
            trend page.

    Returns:
        A complete HTML document.
    """
    limits = policy or PolicyConfig(max_rejected_rate=None)
    return (
        environment()
        .get_template("trend.html")
        .render(
            name=name,
            baseline=baseline,
            records=records,
            headline=headline(records),
            broken=[_told(record) for record in records],
            chart=chart(records, limits),
            severity=chart(records, limits, ("severity",)),
            series=_SERIES,
            judged="the upper ends of their intervals" if limits.judge == "upper" else "the rates",
            diffs=diffs or {},
            style=Markup(read_part("report.css") + read_part("trend.css")),
        )
    )


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is to be known of the newest checkpoint: "figure" is the first line, "detail" what it rests on."""
    if not records:
        return {"figure": "No checkpoint has been scanned yet", "detail": "", "passed": None}
    newest = records[-1]
    failed = broken(newest)
    others = [str(record["name"]) for record in records[:-1] if not record["passed"]]
    if failed:
        figure = f"{newest['name']} FAILED: {failed[0]}"
    elif newest["passed"]:
        figure = f"{newest['name']} passed"
    else:  # of an older memscan, whose record names no rule
        figure = f"{newest['name']} FAILED"
    held = [rule for rule in newest["policy"] if rule["state"] == "passed"]
    told = [f"It also broke: {'; '.join(failed[1:])}."] if failed[1:] else []
    if held and newest["passed"]:
        told.append(f"It keeps {words.plural(len(held), 'limit')}: {'; '.join(kept(rule) for rule in held)}.")
    if not newest["policy"]:
        told.append("The policy has no limit, so nothing was checked.")
    if others:
        listed = ", ".join(others[-3:]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        told.append(f"Of {len(records) - 1:,} before it {len(others):,} failed: {listed}.")
    elif len(records) > 1:
        told.append(f"The {len(records) - 1:,} before it passed." if len(records) > 2 else "The one before it passed.")
    return {"figure": figure, "detail": " ".join(told), "passed": bool(newest["passed"])}


def broken(record: Mapping[str, Any]) -> list[str]:
    """Return each rule that a checkpoint broke, as "VM rate 35% > 10%"."""
    return [_against(rule, ">") for rule in record["policy"] if rule["state"] == "failed"]


def _told(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each rule that was broken, and the first prompts that broke it, as its message names them."""
    rules = [rule for rule in record["policy"] if rule["state"] == "failed"]
    return [
        (
            _against(rule, ">"),
            str(rule["message"]).partition(", limit ")[2].partition(": ")[2] if rule.get("ids") else "",
        )
        for rule in rules
    ]


def kept(rule: Mapping[str, Any]) -> str:
    """Return a rule that was kept, as "VM rate 2% ≤ 10%"."""
    return _against(rule, "≤")


def _against(rule: Mapping[str, Any], sign: str) -> str:
    name = str(rule["name"])
    what = NAMES.get(name, name.removeprefix("max_").replace("_", " "))
    beside = f" (against {rule['against']})" if rule.get("against") else ""
    if rule["value"] is None:
        return f"{what}{beside} unknown, because no prompt was scanned"
    show = words.share if name in _SHARES else words.number if name == "max_new_flagged" else _severity
    return f"{what} {show(rule['value'])} {sign} {show(rule['limit'])}{beside}"


def _severity(value: float) -> str:
    return words.number(float(value), 3)


def chart(
    records: Sequence[Mapping[str, Any]], policy: PolicyConfig | None = None, lines: Sequence[str] = LINES
) -> dict[str, Any]:
    """Positions of the lines in drawing units: x by order, y on one scale from 0 to a round value.

    Args:
        lines: names of figures: rates, which have an interval, or "severity".

    Returns:
        "top": the scale's upper end; "lines": name -> points (x, y, low, high) in units; "ticks": (y, value);
        "limits": the policy's lines (y, name, value), and "beyond" those that lie above the scale; "names": (x, text)
        below the axis.
    """
    limits = policy or PolicyConfig(max_rejected_rate=None)
    drawn = {key: line for key, line in {**_RATE_LIMITS, "max_severity": "severity"}.items() if line in lines}
    asked = [(drawn[key], float(value)) for key in drawn if (value := getattr(limits, key)) is not None]
    largest = max([end for record in records for line in lines for end in _ends(record, line)] + [0.01])
    near = [(line, value) for line, value in asked if value <= largest * _FAR]
    shares = "severity" not in lines
    top = round_up(max([largest, *(value * 1.02 for _, value in near)]))
    top = min(1.0, top) if shares else top
    step = WIDTH / max(1, len(records))

    def height(value: float | None) -> float:
        return round(HEIGHT * (1 - min(1.0, (value or 0.0) / top)), 1)

    def point(at: int, record: Mapping[str, Any], line: str) -> dict[str, Any]:
        rate, low, high = _values(record, line)
        places = {"y": height(rate), "low": height(low), "high": height(high)}
        return {"x": round(step * (at + 0.5), 1), **places, "record": record, "rate": rate}

    every = math.ceil(len(records) / NAMED)
    return {
        "top": top,
        "lines": {line: [point(at, record, line) for at, record in enumerate(records)] for line in lines},
        "ticks": [(height(top * tick / 4), top * tick / 4) for tick in range(5)],
        "limits": [{"y": height(value), "line": line, "value": value} for line, value in near],
        "beyond": [{"line": line, "value": value} for line, value in asked if (line, value) not in near],
        "names": [
            {"x": round(step * (at + 0.5), 1), "text": _short(str(record["name"])), "record": record}
            for at, record in enumerate(records)
            if (len(records) - 1 - at) % every == 0
        ],
        "width": WIDTH,
        "height": HEIGHT,
    }


def _values(record: Mapping[str, Any], line: str) -> tuple[float | None, float | None, float | None]:
    one = record["figures"][line]
    return (one["rate"], one["low"], one["high"]) if isinstance(one, Mapping) else (one, one, one)


def _ends(record: Mapping[str, Any], line: str) -> list[float]:
    high = _values(record, line)[2]
    return [] if high is None else [float(high)]


def _short(name: str) -> str:
    """Its beginning and its end: names of one training differ in their last characters."""
    return name if len(name) <= _NAME else f"{name[: _NAME - 11]}…{name[-10:]}"
