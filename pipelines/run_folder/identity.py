"""This module names a run's content: everything that decides its results, in flat form, and a hash of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from memscan.config import CensusConfig
from memscan.records import SCHEMA_VERSION


def identity(config: CensusConfig, extra: Mapping[str, str]) -> dict[str, str]:
    """Return everything that decides a run's results, in flat form.

    Configuration keys and `extra` (models, inputs) map to JSON values.

    Left out is what `CensusConfig.fingerprint` leaves out: name, place, resources, the reduce's rules.
    """
    flat = dict(_flatten(config.content()))
    return {**flat, **extra, "code.version": code_version(), "code.schema": str(SCHEMA_VERSION)}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True)


def code_version() -> str:
    """Return the version of the installed package, or of the checkout."""
    import memscan

    return str(getattr(memscan, "__version__", "0"))


def fingerprint(content: Mapping[str, str]) -> str:
    """Return 16 hex digits that name a run's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
