"""This module makes the verification page: every repair of one run in one table, with pictures before and after.

The page is static and has no scripts. Captions and names are hostile text, which the template escapes. Measures are the
table's rows and repairs its columns, so that six repairs stand side by side without scrolling.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from memscan.io.images import thumbnail_jpeg
from memscan.mitigation.policy import QUESTIONS, RepairPolicy, judge
from memscan.records import LABELS
from memscan.report import holds, words
from memscan.report.locality import comparison_rows, sentences
from memscan.report.page import environment, read_part

_SIDE = 160
PANELS = {
    "flagged": "Flagged prompts",
    "paraphrases": "Paraphrases of them, by templates that no repair used",
    "ordinary": "Ordinary prompts of the half that no repair has seen",
}
METHODS = ("nemo", "nemo_c", "wanda", "dedup", "finetune")
STARTS = {"all": "all starts", "prompt": "its prompt", "noise": "noise", "unrelated": "another prompt"}
NONE = "\u2013"
Pictures = npt.NDArray[np.uint8]
Result = Mapping[str, Any]
Cell = tuple[str, str]  # figure, what stands small below it


def render_verification(
    results: Sequence[Result],
    before_KHWC: Pictures,
    after: Mapping[str, Pictures],
    copied: Sequence[Pictures | None] = (),
    locality: Mapping[str, Any] | None = None,
    policy: RepairPolicy | None = None,
) -> str:
    """Render the page.

    Args:
        results: contents of verify.json, one a repair.
        before_KHWC: one generation of each pictured prompt by the original.
        after: the same generations by each repair, by its name.
        copied: the training image that each pictured prompt reproduces, where it can be read.
        locality: content of locality.json, where the analyses were made.
        policy: the limits that the repairs must keep; the defaults, which the page calls so, when not given.

    Returns:
        A complete HTML document.
    """
    ordered = sorted(results, key=_place)
    about = ordered[0] if ordered else locality
    judgements = [judge(result, policy or RepairPolicy()) for result in ordered]
    return (
        environment()
        .get_template("verification.html")
        .render(
            run=about["run"] if about else None,
            original=(about["models"]["before"] if ordered else about["model"]) if about else None,
            results=ordered,
            headline=holds.headline(judgements),
            state="passed" if any(one.state == "passed" for one in judgements) else "failed",
            answers=holds.answers(judgements),
            questions=[*QUESTIONS.values()],
            limits=holds.limits(policy or RepairPolicy(), policy is not None),
            verdicts=[holds.verdict(one) for one in judgements],
            groups=table(ordered),
            summaries=[summary(result) for result in ordered],
            panels=PANELS,
            starts=STARTS,
            labels=[*LABELS, "memorised"],
            label_words={**{label: one["name"] for label, one in words.LABELS.items()}, "memorised": ""},
            rows=_pictures(ordered, before_KHWC, after, copied),
            locality=locality,
            locality_rows=comparison_rows(locality) if locality else (),
            locality_words=sentences(locality) if locality else (),
            style=Markup(read_part("report.css") + read_part("verification.css")),
        )
    )


def _place(result: Result) -> tuple[int, str]:
    method = result.get("method")
    return METHODS.index(method) if method in METHODS else len(METHODS), str(result["name"])


def summary(result: Result) -> str:
    """Return a repair in one sentence or two."""
    flagged, attack = result["prompts"]["flagged"], result["attack"]["after"]
    removed, foreground = flagged["severity"]["removed"], flagged["classes"]["after"]["FM"]["rate"]
    told = f"{words.percent(removed)} of the severity is removed" if removed is not None else "There was no severity"
    broken, control = attack["memorised"]["all"]["memorised"]["rate"], attack.get("control", {}).get("all")
    beside = f" (control {words.percent(control['memorised']['rate'])})" if control else ""
    return (
        f"{told}; {words.percent(foreground)} of the generations copy a foreground alone. Under the attack "
        f"{words.percent(broken)} of the draws bring the image back{beside}."
    )


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the table over all repairs: groups of rows, each with the original's cell and one cell per repair."""
    if not results:
        return []
    first = results[0]
    steps = first["settings"]["attack_steps"]

    def row(name: str, note: str, before: Cell, after: Callable[[Result], Cell]) -> dict[str, Any]:
        return {"name": name, "note": note, "cells": [before, *map(after, results)]}

    def both(name: str, note: str, cell: Callable[[Result, str], Cell]) -> dict[str, Any]:
        return row(name, note, cell(first, "before"), lambda one: cell(one, "after"))

    def mix(panel: str, label: str) -> Callable[[Result, str], Cell]:
        return lambda one, when: _rate(one["prompts"][panel]["classes"][when][label])

    def attack(kind: str, label: str) -> Callable[[Result, str], Cell]:
        return lambda one, when: _rate(one["attack"][when].get(kind, {}).get("all", {}).get(label))

    empty = (NONE, "")
    classes = [both(label, words.LABELS[label]["name"].lower(), mix("flagged", label)) for label in LABELS]
    return [
        {
            "title": "Flagged prompts, scanned again",
            "rows": [
                row("Severity removed", "of the harm of all generations", empty, _severity),
                row("by own images", "copies of images that were the prompt's before", empty, _own_severity),
                *classes,
                both("Several images", "of memorised prompts (one-to-many)", _several),
            ],
        },
        {
            "title": "Paraphrases of them",
            "rows": [
                both("Memorised", "", mix("paraphrases", "memorised")),
                both("of it FM", "foreground", mix("paraphrases", "FM")),
            ],
        },
        {
            "title": f"Attack: {steps} steps of embedding search",
            "rows": [
                both("Succeeds", "on memorised images", attack("memorised", "memorised")),
                both("of it FM", "foreground", attack("memorised", "FM")),
                both("Control", "images not known to be memorised", attack("control", "memorised")),
            ],
        },
        {
            "title": "Ordinary prompts",
            "rows": [
                both("Memorised", "", mix("ordinary", "memorised")),
                row(
                    "Fréchet distance",
                    "to training images",
                    _number(first["utility"]["frechet"]["before"]),
                    lambda one: _frechet(one["utility"]),
                ),
                row(
                    "Fréchet distance",
                    "to the original's panel",
                    empty,
                    lambda one: _number(one["utility"]["frechet"]["between"]),
                ),
                row(
                    "Fréchet distance", "to training images, units off", empty, lambda one: _frechet(one["utility_off"])
                ),
                both("Alignment", "with the caption", lambda one, when: _number(one["utility"]["alignment"][when])),
                row("Alignment", "units off", empty, lambda one: _off(one, "alignment")),
                both("Diversity", "over seeds", lambda one, when: _number(one["utility"]["diversity"][when])),
                row("Diversity", "units off", empty, lambda one: _off(one, "diversity")),
            ],
        },
        {
            "title": "Cost",
            "rows": [
                row("Units off", "", empty, _units),
                row("Weights changed", "", empty, _weights),
                row("Made in", "", empty, lambda one: _seconds(one["mitigation_seconds"])),
                both("Examined in", "scan and attacks", _examined),
            ],
        },
    ]


def _rate(one: Mapping[str, Any] | None) -> Cell:
    if one is None or one["rate"] is None:
        return "n/a", ""
    return words.percent(one["rate"]), words.interval(one["low"], one["high"])


def _severity(result: Result) -> Cell:
    return _removed(result["prompts"]["flagged"]["severity"])


def _own_severity(result: Result) -> Cell:
    own = result["prompts"]["flagged"].get("own_images")  # not in what an earlier memscan wrote
    return _removed(own["severity"]) if own else (NONE, "")


def _removed(one: Mapping[str, Any]) -> Cell:
    if one["removed"] is None:
        return "n/a", ""
    return words.percent(one["removed"]), words.interval(one["low"], one["high"])


def _several(result: Result, when: str) -> Cell:
    one = result["prompts"]["flagged"]["one_to_many"][when]
    figure, interval = _rate(one["more_than_one"])
    return figure, f"{interval}; median {words.number(one['median'])}, most {words.number(one['maximum'])}" if (
        one["prompts"]
    ) else ""


def _number(value: float | None) -> Cell:
    return ("n/a" if value is None else f"{value:.4f}"), ""


def _frechet(utility: Mapping[str, Any] | None) -> Cell:
    if not utility:
        return NONE, ""
    one = utility["frechet"]
    return f"{one['after']:.4f}", f"× {one['ratio']:.3f}" if one["ratio"] is not None else ""


def _off(result: Result, measure: str) -> Cell:
    return _number(result["utility_off"][measure]["after"]) if result["utility_off"] else (NONE, "")


def _units(result: Result) -> Cell:
    one = result["units"]
    if not one:
        return NONE, ""
    if one.get("largest") is None or result["scope"] == "all":
        return words.number(one["off"]), f"of {one['of']:,} ({words.percent(one['share'])})"
    return (
        f"up to {one['largest']:,}",
        f"of {one['of']:,} a {result['scope']}, median {words.number(one['median'])}; {one['off']:,} in all",
    )


def _weights(result: Result) -> Cell:
    one = result["changed"]
    return words.number(one["weights"]), words.percent(one["weights"] / one["of"])


def _seconds(value: float | None) -> Cell:
    return ("n/a" if value is None else f"{words.number(value, 0)} s"), ""


def _examined(result: Result, when: str) -> Cell:
    return _seconds(sum(result["seconds"][when].values()))


def _pictures(
    results: Sequence[Result], before_KHWC: Pictures, after: Mapping[str, Pictures], copied: Sequence[Pictures | None]
) -> list[dict[str, Any]]:
    """Return a row of pictures for each prompt: the training image, the original's, and each repair's."""
    captions = results[0]["captions"] if results else []
    rows = []
    for at, caption in enumerate(captions[: len(before_KHWC)]):
        figures = []
        if at < len(copied):
            image = copied[at]
            figures.append({"name": "training image", "label": "", "source": _picture(image)})
        figures.append(
            {"name": "original", "label": _label(results[0], "before", at), "source": _picture(before_KHWC[at])}
        )
        figures += [
            {"name": one["name"], "label": _label(one, "after", at), "source": _picture(after[one["name"]][at])}
            for one in results
        ]
        rows.append({"caption": caption, "figures": figures})
    return rows


def _label(result: Result, when: str, at: int) -> str:
    known = result.get("pictured", {}).get(when, ())
    return str(known[at] or "") if at < len(known) else ""


def _picture(image_HWC: Pictures | None) -> str | None:
    if image_HWC is None:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail_jpeg(image_HWC, _SIDE)).decode()}"
