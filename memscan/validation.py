"""This module explains in one line what is wrong with a configuration.

The errors of pydantic name classes and positions, but users know keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first mistake: its key, what is wrong, the nearest valid key, and how many more there are."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "configuration"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(
            str(first["loc"][-1]), _valid_keys(model, first["loc"][:-1]), n=1, cutoff=0.4
        )
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {key!r}{hint}{more}"
    if first["type"] in ("model_type", "dict_type"):
        return f"{key!r} is a section: give it keys and values{more}"
    if first["type"] == "missing":
        return f"key {key!r} is missing{more}"
    what = first["msg"].removeprefix("Value error, ")
    return f"{key!r}: {what}{more}" if first["loc"] else f"{what}{more}"


def _valid_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        annotation: Any = model.model_fields[str(part)].annotation
        annotation = next((one for one in get_args(annotation) if one is not type(None)), annotation)  # X | None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
