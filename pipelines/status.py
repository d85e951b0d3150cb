"""State of a run as its folder tells it: for a person, or as JSON for a script. Reads only."""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.engine.session import logs_folder
from pipelines.run_folder.progress import clock
from pipelines.run_folder.runs import Run

# A running board writes every half a second to ten seconds; older figures are those of a process that is gone.
FRESH_SECONDS = 60.0


def run_status(path: str) -> dict[str, Any]:
    """Name, state, parts, counts, and the stages' progress of a running job.

    Raises:
        RunError: there is no run.
    """
    run = Run.load(path)
    committed = [number for number in run.parts if run.committed(number) is not None]
    live = _live(path) if run.state == "running" else None
    return {
        "run": path,
        "name": run.manifest["name"],
        "state": run.state if live or run.state != "running" else "stopped",
        "error": run.manifest["error"],
        "created": run.manifest["created"],
        "updated": run.manifest["updated"],
        "fingerprint": run.manifest["fingerprint"],
        "parts": {"committed": len(committed), "total": len(run.parts)},
        "prompts": run.manifest["prompts"],
        "counts": run.progress().to_json(),
        "stages": live,
    }


def describe(status: dict[str, Any]) -> str:
    """The same for a person."""
    counts, prompts = status["counts"], status["prompts"] or {}
    lines = [
        f"run           {status['run']} ({status['name']}, fingerprint {status['fingerprint']})",
        f"state         {status['state']}" + (f": {status['error']}" if status["error"] else ""),
        f"parts         {status['parts']['committed']} of {status['parts']['total']} committed",
        f"prompts       {counts['rows']:,} of {prompts.get('distinct', 0):,} ({prompts.get('rows_read', 0):,} read)",
        f"done          {counts['done']:,}   rejected {counts['rejected']:,}",
        "generations   "
        f"{counts['generations']:,}   " + "  ".join(f"{label} {count:,}" for label, count in counts["labels"].items()),
    ]
    lines += [f"              {reason} {count:,}" for reason, count in counts["reasons"].items()]
    for stage in status["stages"] or []:
        rate = stage["rate"]
        left = f"  {rate:.3g}/s  {clock((stage['total'] - stage['done']) / rate)} left" if rate else ""
        lines.append(f"{stage['stage']:<13} {stage['done']:,}/{stage['total']:,} {stage['unit']}{left}")
    if status["state"] in ("stopped", "interrupted", "failed"):
        lines.append("resume        run the same scan command again")
    return "\n".join(lines)


def _live(path: str) -> list[dict[str, Any]] | None:
    file = logs_folder(path) / "progress.json"
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return figures["stages"] if time.time() - figures["time"] < FRESH_SECONDS else None
