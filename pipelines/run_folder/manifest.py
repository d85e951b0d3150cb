"""This module checks what readers of a run.json rely on: kinds and ranges of its keys.

Other keys may exist, and are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

Count = Annotated[int, Field(ge=0, le=10**15)]


class _Index(BaseModel):
    path: str
    hash: str
    version: Annotated[int, Field(ge=1, le=10**6)] | None = None


class _Prompts(BaseModel):
    rows_read: Count
    distinct: Count
    parts: Annotated[int, Field(ge=0, le=10**7)]


class _Counts(BaseModel):
    inputs: Count
    rows: Count
    done: Count
    rejected: Count
    generations: Count
    labels: dict[str, Count] | None
    reasons: dict[str, Count] | None


class _Manifest(BaseModel):
    name: str
    state: Literal["running", "interrupted", "failed", "complete"]
    error: str | None
    created: datetime
    updated: datetime
    completed: datetime | None = None
    code_version: str
    code_versions: list[str] | None = None  # of every driver that worked on it, the first one first
    fingerprint: str
    config_fingerprint: str
    models: dict[str, str]
    generator: dict[str, Any] | None = None
    index: _Index | None
    prompts: _Prompts | None
    counts: _Counts | None
    identity: dict[str, str]
    config: dict[str, Any]
    begun_in: dict[str, str] | None = None


def damage(manifest: Mapping[str, Any]) -> str | None:
    """Return the first key that does not hold what it should, with what is wrong; None for a valid document."""
    return _first(_Manifest, manifest)


def damage_of_counts(counts: Any) -> str | None:
    """Return what `damage` returns, for the counts in a commit record."""
    return _first(_Counts, counts)


def _first(model: type[BaseModel], data: Any) -> str | None:
    try:
        model.model_validate(data, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    return None
