"""This module names a run's content: everything that decides its results, in flat form, and a hash of it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memscan.config import CensusConfig
from memscan.errors import RunError
from memscan.records import SCHEMA_VERSION

CODE = "code.version"
# What of memscan/ decides the rows that a scan writes. What reads them, and what moves them, may change under a run.
DECIDING = ("detection", "index", "localization", "metric", "models", "prompts", "sources", "worker", "records.py")
# Releases that wrote no hash of their code: their runs give the same rows today (tests/pipelines/run_folder).
ALIKE = ("0.1.0",)
# With this variable at 1, a run goes on that other code began.
ACCEPT = "MEMSCAN_OTHER_CODE"


def identity(config: CensusConfig, extra: Mapping[str, str]) -> dict[str, str]:
    """Return everything that decides a run's results, in flat form.

    Configuration keys and `extra` (models, inputs) map to JSON values.

    Left out is what `CensusConfig.fingerprint` leaves out: name, place, resources, the reduce's rules.
    """
    flat = dict(_flatten(config.content()))
    return {**flat, **extra, CODE: code_version(), "code.schema": str(SCHEMA_VERSION)}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True)


def code_version() -> str:
    """Return the package's version with a hash of the code that decides results, as "0.2.0+1f2e3d4c5b6a"."""
    import memscan

    return f"{memscan.__version__}+{code_hash(Path(memscan.__file__).parent)}"


@functools.cache
def code_hash(package: Path) -> str:
    """12 hex digits over `DECIDING` in a package's folder: comments, empty lines and line ends change nothing."""
    found = hashlib.sha256()
    for file in (file for name in DECIDING for file in _files(package / name)):
        lines = (line.rstrip() for line in file.read_text(encoding="utf-8").splitlines())
        code = [line for line in lines if line and not line.lstrip().startswith("#")]
        found.update("\n".join([file.relative_to(package).as_posix(), *code, ""]).encode())
    return found.hexdigest()[:12]


def _files(room: Path) -> list[Path]:
    """A room's files of code and of what code reads (calibrations), in one order on every machine; or the one file."""
    return [room] if room.is_file() else sorted(file for kind in ("*.py", "*.json") for file in room.rglob(kind))


def same_code(begun: str | None, here: str | None) -> bool:
    """Return whether another version may continue a run that one version began; always where `ACCEPT` says so."""
    return begun == here or str(begun).partition("+")[0] in ALIKE or os.environ.get(ACCEPT) == "1"


def with_this_code(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of the versions that worked on its run, this one's included, the first one first."""
    known = manifest.get("code_versions") or [manifest["code_version"]]
    return {"code_versions": list(dict.fromkeys([*known, code_version()]))}


def refuse_other_code(path: str, old: Mapping[str, str], content: Mapping[str, str], state: str = "running") -> None:
    """Raise RunError if rows of two versions of the code would be mixed in a run that is not complete."""
    begun, here = old.get(CODE), content.get(CODE)
    if state == "complete" or same_code(begun, here):
        return
    raise RunError(
        f"holds a run that other code began (memscan {begun}, here is {here}), and its rows may differ",
        where=path,
        hint=f"finish it with that version, take another folder with --set out=DIR, or set {ACCEPT}=1 to mix both",
    )


def fingerprint(content: Mapping[str, str]) -> str:
    """Return 16 hex digits that name a run's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
