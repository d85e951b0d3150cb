"""This module lists the runs below a folder as a table, from their manifests and, if reduced, their figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memscan.errors import InputError, MemscanError
from memscan.io import storage
from pipelines.run_folder.runs import Run
from pipelines.scan.status import state_of

NONE = "-"


def list_runs(folder: str) -> list[dict[str, Any]]:
    """Return the runs below a folder at any depth, newest first.

    Returns:
        path, name, model, state, prompts, done, rejected, flagged, memorised (share of prompts, None if the run is
        not reduced), created, and error: why a folder that has a run.json cannot be read, otherwise None.

    Raises:
        InputError: there is no such folder.
    """
    if not storage.is_dir(folder):
        raise InputError("no such folder", where=folder, hint="give the folder that holds run folders")
    files = [file for file in storage.list_files(folder, "run.json") if file.rpartition("/")[2] == "run.json"]
    found = [_one(file.rpartition("/")[0]) for file in files]
    return sorted(found, key=lambda one: (one["created"] or "", one["path"]), reverse=True)


def describe_runs(found: Sequence[dict[str, Any]]) -> str:
    """Return the table as text for a person."""
    if not found:
        return "no runs here"
    head = ("run", "model", "state", "prompts", "memorised", "begun", "folder")
    rows = [
        (
            one["name"] or NONE,
            one["model"] or NONE,
            one["state"] if one["error"] is None else f"unreadable: {one['error']}",
            NONE if one["prompts"] is None else f"{one['prompts']:,}",
            NONE if one["memorised"] is None else f"{one['memorised']:.2%}",
            (one["created"] or NONE)[:16].replace("T", " "),
            one["path"],
        )
        for one in found
    ]
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in [head, *rows]
    )


def _one(path: str) -> dict[str, Any]:
    empty = dict.fromkeys(("name", "model", "state", "prompts", "done", "rejected", "flagged", "memorised", "created"))
    try:
        run = Run.load(path)
    except MemscanError as error:
        return {"path": path, **empty, "error": error.what}
    manifest = run.manifest
    counts, prompts = manifest["counts"] or {}, manifest["prompts"] or {}
    return {
        "path": path,
        **empty,
        "name": manifest["name"],
        "model": manifest["models"].get("generator"),
        "state": state_of(run),
        "prompts": prompts.get("distinct"),
        "done": counts.get("done"),
        "rejected": counts.get("rejected"),
        **_figures(run),
        "created": manifest["created"],
        "error": None,
    }


def _figures(run: Run) -> dict[str, Any]:
    """Of a reduced run; nothing of figures that are another run's or cannot be read."""
    path = storage.join(run.folder.path, "census.json")
    try:
        census = storage.read_json(path) if storage.exists(path) else None
        if census is None or census["run"]["fingerprint"] != run.manifest["fingerprint"]:
            return {}
        return {"flagged": census["counts"]["flagged"], "memorised": census["prompts"]["memorised"]["rate"]}
    except (InputError, KeyError, TypeError):
        return {}
