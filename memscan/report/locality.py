"""This module describes the locality analyses in words, for the verification page and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memscan.report import words

Document = Mapping[str, Any]
HEADS = ("", "within one image", "between images", "difference (95 %)")


def comparison_rows(document: Document) -> list[dict[str, Any]]:
    """Return the rows of the table.

    Each has "name", "note", and "cells" (a figure, and the small text below it) for within, between and their
    difference.
    """
    chosen = document["chosen"]
    rows = [
        _row("Embeddings where searches began", "L2 distance", document["embeddings"]["starts"]),
        _row("Embeddings found", "L2 distance", document["embeddings"]["found"]),
    ]
    for layer, one in document["activations"].items():
        rows.append(_row("Activations", f"1 - cosine, {layer}", one))
    rows.append(
        _row("Units chosen by NeMo", f"overlap; {_sizes(chosen['nemo'], 'units')}", document["overlap"]["nemo"])
    )
    rows.append(
        _row("Weights chosen by Wanda", f"overlap; {_sizes(chosen['wanda'], 'weights')}", document["overlap"]["wanda"])
    )
    return rows


def _sizes(sizes: Mapping[str, Any], what: str) -> str:
    if sizes["median"] is None:
        return f"no {what}"
    low, middle, high = (words.number(sizes[key], 0) for key in ("low", "median", "high"))
    return f"{low} to {high} {what} per embedding, median {middle}"


def _row(name: str, note: str, one: Mapping[str, Any]) -> dict[str, Any]:
    difference = ("n/a", "")
    if one["difference"] is not None:
        between = f"{_signed(one['low'])} to {_signed(one['high'])}" if one["low"] is not None else ""
        difference = (_signed(one["difference"]), between)
    return {"name": name, "note": note, "cells": [_spread(one["within"]), _spread(one["between"]), difference]}


def _spread(one: Mapping[str, Any]) -> tuple[str, str]:
    if one["mean"] is None:
        return "n/a", _undefined(one)
    return _figure(
        one["mean"]
    ), f"{_figure(one['low'])} to {_figure(one['high'])}; {words.plural(one['pairs'], 'pair')}{_undefined(one)}"


def _undefined(one: Mapping[str, Any]) -> str:
    return f", {one['undefined']:,} of two empty choices" if one["undefined"] else ""


def _figure(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{_figure(abs(value))}"


def sentences(document: Document) -> list[str]:
    """Return sentences about what was examined, and about what the table shows."""
    images, settings = document["images"], document["settings"]
    by_start = ", ".join(f"{start} {hits:,} of {total:,}" for start, hits, total in found_by_start(document))
    told = (
        f"{document['found']:,} of {document['searches']:,} searches on {words.plural(len(images), 'memorised image')} "
        f"of the scanned model found an embedding that brings the image back ({settings['attack_steps']} steps each; "
        f"starts: {by_start}). Those embeddings are compared."
    )
    verdicts = [
        _verdict("Embeddings", document["embeddings"]["found"], distance=True),
        _verdict("Activations, mean over the layers,", _joined(document["activations"].values()), distance=True),
        _verdict("The units that NeMo chooses", document["overlap"]["nemo"], distance=False),
        _verdict("The weights that Wanda chooses", document["overlap"]["wanda"], distance=False),
    ]
    return [told, *verdicts]


def _joined(layers: Any) -> dict[str, Any]:
    """Means over layers, without an interval."""
    known = [one for one in layers if one["within"]["mean"] is not None and one["between"]["mean"] is not None]
    if not known:
        return {"within": {"mean": None}, "between": {"mean": None}, "low": None, "high": None}
    means = {part: {"mean": sum(one[part]["mean"] for one in known) / len(known)} for part in ("within", "between")}
    return {**means, "low": None, "high": None}


def _verdict(name: str, one: Mapping[str, Any], *, distance: bool) -> str:
    within, between = one["within"]["mean"], one["between"]["mean"]
    if within is None or between is None:
        return f"{name}: too few to compare."
    if distance:
        share = f"are {within / between:.2f} times as far apart" if between else f"are {_figure(within)} apart"
        told = f"{name} of one image {share} as those of different images"
    else:
        told = f"{name} overlap by {within:.2f} for one image and by {between:.2f} for different images"
    if one["low"] is None:
        return f"{told}."
    sure = one["low"] > 0 or one["high"] < 0
    return f"{told}{'' if sure else ': no difference that this many images would show'}."


def table(document: Document) -> str:
    """Return the table as Markdown, with the sentences."""
    lines = ["| | " + " | ".join(HEADS[1:]) + " |", "|---" * len(HEADS) + "|"]
    for row in comparison_rows(document):
        cells = [f"{figure} ({small})" if small else figure for figure, small in row["cells"]]
        lines.append(f"| {row['name']} ({row['note']}) | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *sentences(document)])


def found_by_start(document: Document) -> Sequence[tuple[str, int, int]]:
    """Return (start, embeddings that bring the image back, searches) for each kind of starting point."""
    counts: dict[str, list[int]] = {}
    for image in document["images"]:
        for draw in image["draws"]:
            one = counts.setdefault(draw["start"], [0, 0])
            one[0] += draw["label"] != "NM"
            one[1] += 1
    return [(start, hits, total) for start, (hits, total) in counts.items()]
