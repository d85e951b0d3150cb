"""This module compares two censuses prompt by prompt: newly flagged, no longer flagged, and the change of each rate.

Only prompts that both runs processed are compared (`trend.compare`), so that a rate cannot change because the prompts
changed. A rate belongs to the same prompts before and after, so its difference is tested and bounded as a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import pyarrow as pa

from memscan.census.trend import Change, Panel, mcnemar, panel_change
from memscan.errors import InputError
from memscan.intervals import CONFIDENCE
from memscan.records import CHANGES, MEMORISED, Label, alike

KINDS = {"new": "newly flagged", "gone": "no longer flagged", "relabelled": "another class"}


@dataclass(frozen=True)
class Differences:
    """These are the differences of two censuses; `changes` is `records.CHANGES`, most harm first within each kind."""

    change: Change
    rates: dict[str, dict[str, Any]]
    changes: pa.Table

    def to_json(self) -> dict[str, Any]:
        """Return the figures: counts, rates and the test, without the rows."""
        counts = {kind: len(getattr(self.change, kind)) for kind in KINDS}
        return {"common": self.change.common, "counts": counts, "rates": self.rates}


def differences(before: Panel, after: Panel, flagged_before: pa.Table, flagged_after: pa.Table) -> Differences:
    """Compare two runs.

    Args:
        before, after: what each run processed and flagged.
        flagged_before, flagged_after: their flagged lists (`records.FLAGGED`).

    Raises:
        InputError: they have no prompt in common.
    """
    same = alike(before.done, after.done)
    before, after = before.named(same), after.named(same)
    change = panel_change("before", before, after)
    if not change.common:
        raise InputError("the runs have no prompt in common", hint="compare runs over the same prompts")
    common = before.done & after.done
    labels = [{key: label for key, label in panel.flagged.items() if key in common} for panel in (before, after)]
    kinds = {"memorised": MEMORISED} | {label: [label] for label in MEMORISED}
    rates = {name: _rate(members, labels[0], labels[1], change.common) for name, members in kinds.items()}
    return Differences(change, rates, _rows(change, flagged_before, flagged_after, same))


def paired_interval(gained: int, lost: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of (gained - lost) / total, a difference of two paired rates, in [-1, 1].

    Source: Agresti & Min, Statistics in Medicine 24 (2005), section 3: Wald's interval with 1/2 added to each of the
    four cells of the table of pairs.

    Raises:
        ValueError: more pairs changed than there are.
    """
    if min(gained, lost) < 0 or gained + lost > total:
        raise ValueError(f"{gained} gained and {lost} lost of {total}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    up, down, count = gained + 0.5, lost + 0.5, total + 2
    middle = (up - down) / count
    spread = z * math.sqrt(max(0.0, up + down - (up - down) ** 2 / count)) / count
    return max(-1.0, middle - spread), min(1.0, middle + spread)


def _rate(members: Sequence[str], before: Mapping[str, str], after: Mapping[str, str], total: int) -> dict[str, Any]:
    then = {key for key, label in before.items() if label in members}
    now = {key for key, label in after.items() if label in members}
    gained, lost = len(now - then), len(then - now)
    low, high = paired_interval(gained, lost, total)
    return {
        "before": {"count": len(then), "rate": len(then) / total},
        "after": {"count": len(now), "rate": len(now) / total},
        "gained": gained,
        "lost": lost,
        "difference": (gained - lost) / total,
        "low": low,
        "high": high,
        "p_value": mcnemar(gained, lost),
    }


def _rows(change: Change, flagged_before: pa.Table, flagged_after: pa.Table, same: Callable[[str], str]) -> pa.Table:
    names = ["prompt_id", "caption", "label", "severity", "match_ids"]
    wanted = {kind: set(getattr(change, kind)) for kind in KINDS}
    every = set().union(*wanted.values())
    sides = []
    for table in (flagged_before, flagged_after):
        rows = table.select(names).to_pylist()
        sides.append({same(row["prompt_id"]): row for row in rows if same(row["prompt_id"]) in every})
    found = []
    for kind, keys in wanted.items():
        rows = [_row(kind, key, sides[0].get(key), sides[1].get(key)) for key in keys]
        found += sorted(rows, key=_worst_first)
    return pa.Table.from_pylist(found, schema=CHANGES)


def _worst_first(row: Mapping[str, Any]) -> tuple[float, str]:
    return -max(row["severity_before"] or 0.0, row["severity_after"] or 0.0), row["prompt_id"]


def _row(kind: str, key: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    known = after or before
    assert known is not None
    nothing: dict[str, Any] = {"label": Label.NM.value, "severity": None, "match_ids": []}
    row = {"change": kind, "prompt_id": key, "caption": known["caption"]}
    for name, side in (("before", before or nothing), ("after", after or nothing)):
        row |= {f"label_{name}": side["label"], f"severity_{name}": side["severity"]}
        row[f"match_ids_{name}"] = side["match_ids"]
    return row


def settings_that_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the settings in which two censuses (`census.json`) differ: name -> value before and after.

    A difference between runs is one of checkpoints only where nothing else differs.
    """
    pairs = {
        **{f"model {role}": [one["models"].get(role) for one in (before, after)] for role in _roles(before, after)},
        "index": [one["index"]["hash"] if one["index"] else None for one in (before, after)],
        "metric": [one["method"]["metric"] for one in (before, after)],
        "canvas": [one["method"]["canvas"] for one in (before, after)],
        **{
            f"{region} threshold": [one["method"]["thresholds"][region] for one in (before, after)]
            for region in ("foreground", "background")
        },
        "verdict": [one["method"]["verdict"] for one in (before, after)],
        **{
            f"generator {key}": [one["run"]["config"]["generator"].get(key) for one in (before, after)]
            for key in ("samples", "steps", "guidance", "seed")
        },
        "generator scheduler": [_scheduler(one) for one in (before, after)],
    }
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def _scheduler(census: Mapping[str, Any]) -> Any:
    """Return the one that sampled: a configuration may leave it to the checkpoint."""
    return (census["method"].get("generator") or census["run"]["config"]["generator"]).get("scheduler")


def _roles(*censuses: Mapping[str, Any]) -> list[str]:
    return sorted({role for census in censuses for role in census["models"]})


def table(found: Mapping[str, Any]) -> str:
    """Return a difference's figures (`Differences.to_json`) as text for a terminal."""
    lines = [f"{'':10}{'before':>18}{'after':>18}{'difference':>14}{'95% interval':>20}{'McNemar p':>12}"]
    for name, rate in found["rates"].items():
        sides = [f"{rate[side]['count']:,} ({rate[side]['rate']:.2%})" for side in ("before", "after")]
        bounds = f"{rate['low']:+.2%} to {rate['high']:+.2%}"
        figures = f"{rate['difference']:>+14.2%}{bounds:>20}{rate['p_value']:>12.3g}"
        lines.append(f"{name:10}{sides[0]:>18}{sides[1]:>18}{figures}")
    return "\n".join(lines)
