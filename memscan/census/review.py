"""This module combines people's verdicts on flagged prompts, as the report saves them (review.json), with memscan's.

A reviewer confirms a prompt, dismisses it, or is unsure, and may leave a note. Several reviewers' files are
combined. If they disagree on a prompt, it counts as unsure. Counts conserve: every verdict on a flagged prompt is
confirmed, dismissed or unsure, and those on prompts that the list no longer holds are counted as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memscan.census.rates import rate
from memscan.errors import InputError
from memscan.io import storage
from memscan.records import MEMORISED

FORMAT = "memscan-review/1"
Verdict = Literal["confirmed", "dismissed", "unsure"]
VERDICTS: tuple[Verdict, ...] = ("confirmed", "dismissed", "unsure")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt_id: str = Field(min_length=1, max_length=200)
    verdict: Verdict | None
    note: str = Field("", max_length=10_000)
    when: str = Field("", max_length=100)
    reviewer: str = Field("", max_length=1_000)


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal["memscan-review/1"]
    run: str
    reviewer: str = ""
    verdicts: list[_Entry]


@dataclass(frozen=True)
class Judgement:
    """This is what reviewers say about one prompt: one verdict, and all notes.

    Args:
        verdict: "unsure" where reviewers disagree.
        agreed: False where they do.
        when: of the latest verdict, as its browser wrote it.
    """

    prompt_id: str
    verdict: Verdict
    reviewers: tuple[str, ...]
    notes: tuple[str, ...]
    when: str
    agreed: bool = True


def read_reviews(paths: Sequence[str], run: str) -> dict[str, Judgement]:
    """Read review files of a run, and combine them by prompt.

    Args:
        run: the run's fingerprint, which every file has to name.

    Returns:
        Prompt id -> judgement, of the prompts that have a verdict.

    Raises:
        InputError: a file is missing, is not a review.json, or is of another run.
    """
    entries: dict[tuple[str, str], _Entry] = {}
    for path in paths:
        document = _read(path)
        if document.run != run:
            raise InputError(f"is a review of run {document.run}, not of {run}", where=path)
        for entry in document.verdicts:
            key = (entry.prompt_id, entry.reviewer or document.reviewer)
            known = entries.get(key)
            if entry.verdict is not None and (known is None or entry.when >= known.when):
                entries[key] = entry
    by_prompt: dict[str, list[tuple[str, _Entry]]] = {}
    for (prompt, reviewer), entry in sorted(entries.items()):
        by_prompt.setdefault(prompt, []).append((reviewer, entry))
    return {prompt: _judgement(prompt, found) for prompt, found in by_prompt.items()}


def summarise_review(judgements: Mapping[str, Judgement], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the figures of a review beside memscan's verdicts.

    Args:
        labels: prompt id -> the machine's label, of all flagged prompts.

    Returns:
        reviewed, confirmed, dismissed, unsure, disagreements, not_flagged (verdicts on prompts that are not in the list
        any more), reviewers; precision: confirmed of confirmed and dismissed, with its Wilson interval; the same by
        label under "classes"; "verdicts": a row per prompt.
    """
    here = {prompt: one for prompt, one in judgements.items() if prompt in labels}
    classes = {
        label: {
            "flagged": sum(one == label for one in labels.values()),
            **_counts([judgement for prompt, judgement in here.items() if labels[prompt] == label]),
        }
        for label in MEMORISED
    }
    return {
        "format": FORMAT,
        **_counts(list(here.values())),
        "disagreements": sum(not one.agreed for one in here.values()),
        "not_flagged": len(judgements) - len(here),
        "reviewers": sorted({name for one in here.values() for name in one.reviewers if name}),
        "classes": classes,
        "verdicts": [
            {
                "prompt_id": prompt,
                "machine": labels[prompt],
                "verdict": one.verdict,
                "reviewers": list(one.reviewers),
                "notes": list(one.notes),
                "when": one.when,
            }
            for prompt, one in sorted(here.items())
        ],
    }


def _counts(judgements: Sequence[Judgement]) -> dict[str, Any]:
    found = Counter(one.verdict for one in judgements)
    decided = found["confirmed"] + found["dismissed"]
    precision = rate(found["confirmed"], decided).as_dict()
    return {"reviewed": len(judgements), **{name: found[name] for name in VERDICTS}, "precision": precision}


def _judgement(prompt: str, found: Sequence[tuple[str, _Entry]]) -> Judgement:
    verdicts = {entry.verdict for _, entry in found}
    agreed = len(verdicts) == 1
    first = found[0][1].verdict
    return Judgement(
        prompt,
        first if agreed and first is not None else "unsure",
        tuple(reviewer for reviewer, _ in found),
        tuple(entry.note for _, entry in found if entry.note),
        max(entry.when for _, entry in found),
        agreed,
    )


def _read(path: str) -> _Document:
    data = storage.read_json(path)
    try:
        return _Document.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"is no review.json of the report ({place}: {first['msg']})"[:300],
            where=path,
            hint="save it with the button in the report",
        ) from None
