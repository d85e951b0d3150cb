"""This module says in words whether repairs keep their limits, for the verification page and for the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memscan.mitigation.policy import QUESTIONS, Held, Judgement, RepairPolicy
from memscan.report import words

_STATES = {"passed": "passed", "failed": "FAILED", "unknown": "not known", "not asked": "no limit"}
DEFAULT = (
    "The limits are memscan's defaults, which nobody has chosen for this model. With the option --policy, memscan "
    "verify checks repairs against your own."
)


def headline(judgements: Sequence[Judgement]) -> str:
    """Return the answer in one line: whether the repair holds, and what it breaks first; of several, which hold."""
    if not judgements:
        return "No repair has been verified"
    if len(judgements) == 1:
        return verdict(judgements[0])
    good = [one.name for one in judgements if one.state == "passed"]
    if not good:
        return f"None of {len(judgements):,} repairs holds"
    return f"{len(good):,} of {len(judgements):,} repairs {'holds' if len(good) == 1 else 'hold'}: {', '.join(good)}"


def verdict(judgement: Judgement) -> str:
    """Return one line about a repair: "nemo holds", or "nemo FAILED: 73.3% of the severity removed, at least 90%"."""
    if not judgement.rules:
        return f"{judgement.name}: the policy has no limit"
    if judgement.state == "passed":
        return f"{judgement.name} holds: the memorisation is gone, the attack fails, quality is kept"
    first = next(rule for rule in judgement.rules if rule.state == judgement.state)
    state = "FAILED" if judgement.state == "failed" else "is not decided"
    return f"{judgement.name} {state}: {told(first)}"


def told(rule: Held) -> str:
    """Return a limit and what was found, in words."""
    bound = "at least" if rule.least else "at most"
    ratio = rule.rule.endswith("_ratio")
    show = _times if ratio else words.share
    value = "not measured" if rule.value is None else show(rule.value)
    what = {
        "min_severity_removed": f"{value} of the severity removed",
        "max_paraphrases_memorised": f"{value} of paraphrases memorised",
        "max_attack_success": f"{value} of the attack's draws bring the image back, beyond the control",
        "max_frechet_ratio": f"Fréchet distance {value}",
        "min_alignment_ratio": f"alignment {value}",
    }[rule.rule]
    return f"{what}, {bound} {show(rule.limit)}"


def answers(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Rows of the table of answers: "name", "state", and for each question its state and lines."""
    return [
        {
            "name": one.name,
            "state": one.state,
            "said": _STATES[one.state],
            "cells": [
                {
                    "state": one.of(question),
                    "said": _STATES[one.of(question)],
                    "lines": [told(rule) for rule in one.rules if rule.question == question],
                }
                for question in QUESTIONS
            ],
        }
        for one in judgements
    ]


def limits(policy: RepairPolicy, chosen: bool) -> str:
    """Return what the answers were held against."""
    judged = (
        "If a figure has a 95% interval, the less favourable end of it is compared with the limit."
        if policy.judge == "bound"
        else "The figures themselves are compared with the limits; their 95% intervals are shown below."
    )
    return judged if chosen else f"{judged} {DEFAULT}"


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"× {value:.3g}"
