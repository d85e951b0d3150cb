"""This module explains in one line what is wrong with a configuration.

The errors of pydantic name classes and positions, but users know keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# Further mistakes are only counted: a file with a hundred mistakes is not a configuration.
MOST = 20
Location = Sequence[int | str]


def explain(
    error: ValidationError, model: type[BaseModel], place: Callable[[Location], str] = lambda location: ""
) -> str:
    """Return every mistake with its key, what is wrong, the nearest valid key, and its place.

    Args:
        place: where in a file the value of a key stands, such as "line 7"; "" if nobody knows.
    """
    return listed([_told(one, model, place(one["loc"])) for one in error.errors()])


def listed(mistakes: Sequence[str]) -> str:
    """Return one mistake as it is; for several, return their number, and then each of them with its own number."""
    if len(mistakes) == 1:
        return mistakes[0]
    numbered = [f"({number}) {mistake}" for number, mistake in enumerate(mistakes[:MOST], 1)]
    more = f"; and {len(mistakes) - MOST} more" if len(mistakes) > MOST else ""
    return f"{len(mistakes)} mistakes: {'; '.join(numbered)}{more}"


def _told(one: Any, model: type[BaseModel], place: str) -> str:
    key = ".".join(str(part) for part in one["loc"]) or "configuration"
    beside = f" ({place})" if place else ""
    if one["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(str(one["loc"][-1]), _valid_keys(model, one["loc"][:-1]), n=1, cutoff=0.4)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {key!r}{hint}{beside}"
    if one["type"] in ("model_type", "dict_type"):
        return f"{key!r} is a section: give it keys and values{beside}"
    if one["type"] == "missing":
        return f"key {key!r} is missing{beside}"
    what = one["msg"].removeprefix("Value error, ")
    return f"{key!r}: {what}{beside}" if one["loc"] else f"{what}{beside}"


def _valid_keys(model: type[BaseModel], location: Location) -> list[str]:
    for part in location:
        if isinstance(part, int):  # the sections of a list are alike
            continue
        annotation: Any = model.model_fields[str(part)].annotation
        found = next((one for one in _inner(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _inner(annotation: Any) -> list[Any]:
    """Return the annotation and everything inside it: X | None, list[X]."""
    found = [annotation]
    for one in get_args(annotation):
        found += _inner(one)
    return found
