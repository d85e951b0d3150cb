"""This module describes the state of a run from its folder, for a person or as JSON for a script.

It only reads.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

from pipelines.ray.progress import clock
from pipelines.ray.session import logs_folder
from pipelines.run_folder.lease import holder
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts

# A running display writes every half a second to ten seconds; older figures are those of a process that is gone.
FRESH_SECONDS = 60.0
# Parts whose commits tell the pace where the stages' own figures are on another machine.
PACE_PARTS = 10


def run_status(path: str) -> dict[str, Any]:
    """Name, state, who works on it, parts, counts, and the stages' progress of a running job.

    Raises:
        RunError: there is no run.
    """
    run = Run.load(path)
    commits = {number: record for number in run.parts if (record := run.commit_record(number)) is not None}
    counts = sum((Counts.from_json(record["counts"]) for record in commits.values()), Counts())
    held = holder(run.folder.leases)
    alive = run.state == "running" and held is not None and held.working
    stages = _stages(path) if alive else None
    total = int((run.manifest["prompts"] or {}).get("distinct", 0))
    pace = None if stages else _pace(list(commits.values())) if alive else None
    return {
        "run": path,
        "name": run.manifest["name"],
        "state": state_of(run),
        "error": run.manifest["error"],
        "created": run.manifest["created"],
        "updated": run.manifest["updated"],
        "fingerprint": run.manifest["fingerprint"],
        "holder": {"host": held.host, "pid": held.pid, "seen": held.age} if held and alive else None,
        "parts": {"committed": len(commits), "total": len(run.parts)},
        "prompts": run.manifest["prompts"],
        "counts": counts.to_json(),
        "stages": stages,
        "queue": _queue(stages, total, counts.rows) if stages else None,
        "pace": {"rate": pace, "left": (total - counts.rows) / pace} if pace else None,
    }


def state_of(run: Run) -> str:
    """Return the run's state, derived: "stopped" where it says that it is running and nobody works on it."""
    held = holder(run.folder.leases) if run.state == "running" else None
    return run.state if run.state != "running" or (held is not None and held.working) else "stopped"


def describe(status: dict[str, Any]) -> str:
    """Return the same as text for a person."""
    counts, prompts = status["counts"], status["prompts"] or {}
    lines = [
        f"run           {status['run']} ({status['name']}, fingerprint {status['fingerprint']})",
        f"state         {status['state']}" + (f": {status['error']}" if status["error"] else ""),
    ]
    if held := status["holder"]:
        lines.append(f"working       process {held['pid']} on {held['host']}, heard of {held['seen']:.0f} s ago")
    lines += [
        f"parts         {status['parts']['committed']} of {status['parts']['total']} committed",
        f"prompts       {counts['rows']:,} of {prompts.get('distinct', 0):,} ({prompts.get('rows_read', 0):,} read)",
        f"done          {counts['done']:,}   rejected {counts['rejected']:,}",
        "generations   "
        f"{counts['generations']:,}   " + "  ".join(f"{label} {count:,}" for label, count in counts["labels"].items()),
    ]
    lines += [f"              {reason} {count:,}" for reason, count in counts["reasons"].items()]
    lines += [_stage(stage) for stage in status["stages"] or []]
    if queue := status["queue"]:
        lines.append("waiting       " + "   ".join(f"{stage} {count:,}" for stage, count in queue.items()))
    if pace := status["pace"]:
        lines.append(f"pace          {pace['rate']:.3g}/s  {clock(pace['left'])} left (by the last commits)")
    if status["state"] in ("stopped", "interrupted", "failed"):
        lines.append("resume        run the same scan command again")
    return "\n".join(lines)


def _stage(stage: dict[str, Any]) -> str:
    parts = [f"{stage['stage']:<13} {stage['done']:,}/{stage['total']:,} {stage['unit']}"]
    if stage["rate"]:
        parts.append(f"{stage['rate']:.3g}/s")
    elif not stage["starts"]:
        parts.append("loading models")
    if stage["left"] is not None and stage["done"] < stage["total"]:
        parts.append(f"{clock(stage['left'])} left")
    parts += [f"{name} {count:,}" for name, count in sorted(stage["notes"].items())]
    return "  ".join(parts)


def _queue(stages: list[dict[str, Any]], total: int, committed: int) -> dict[str, int]:
    """Return rows that wait for a stage or are in it, and those that are classified and in no committed part."""
    before, waiting = total, {}
    for stage in stages:
        if stage["stage"] not in ("sample", "judge"):
            return {}  # the index is being built
        waiting[stage["stage"]] = max(0, before - stage["done"])
        before = stage["done"]
    return {**waiting, "commit": max(0, before - committed)}


def _pace(commits: list[dict[str, Any]]) -> float | None:
    """Return rows per second between the last commits; None if there are too few."""
    latest = sorted((datetime.fromisoformat(one["committed"]), one["counts"]["rows"]) for one in commits)[-PACE_PARTS:]
    if len(latest) < 2:
        return None
    seconds = (latest[-1][0] - latest[0][0]).total_seconds()
    return sum(rows for _, rows in latest[1:]) / seconds if seconds > 0 else None


def _stages(path: str) -> list[dict[str, Any]] | None:
    file = logs_folder(path) / "progress.json"
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    stages: list[dict[str, Any]] = figures["stages"]
    return stages if time.time() - figures["time"] < FRESH_SECONDS else None
