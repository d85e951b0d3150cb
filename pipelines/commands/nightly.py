"""This module is the command `memscan nightly`.

It scans new checkpoints with a fixed panel and checks them against a policy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.shared import AsJson, guarded, say, show

POLICY_FAILED = 3
NOT_SCANNED = 4


def nightly(
    watch_path: Annotated[
        Path,
        typer.Argument(
            metavar="WATCH.yaml", help="This file says what is watched, with which panel, and under which policy."
        ),
    ],
    standing: Annotated[
        bool, typer.Option("--standing", help="If nothing is new, check the newest checkpoint against the policy.")
    ] = False,
    junit_file: Annotated[
        Path | None,
        typer.Option(
            "--junit",
            metavar="FILE",
            help="Write JUnit XML of this call to this file too, in addition to that of the registry.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Scan new checkpoints, compare them with the last one and the baseline, and check them against the policy.

    The exit code is 0 if nothing is new or all checkpoints passed, 3 if a policy failed, 4 if a checkpoint could not be
    scanned, and 2 for a mistake.
    """
    where: list[str] = []
    with guarded(where):
        from memscan.census.policy import load_watch
        from memscan.report.junit import junit
        from pipelines.nightly.job import nightly as run_nightly
        from pipelines.nightly.publish import summary

        watch = load_watch(watch_path)
        where.append(watch.out)
        outcome = run_nightly(watch, say)
        judged = outcome.new or (outcome.records[-1:] if standing else [])
        document = summary(watch, judged, outcome.errors)
        if junit_file is not None:
            junit_file.parent.mkdir(parents=True, exist_ok=True)
            junit_file.write_bytes(junit(watch.name, judged, outcome.errors))
        show(json.dumps(document, indent=2) if as_json else _describe(document, len(outcome.records)))
        if outcome.errors:
            raise typer.Exit(NOT_SCANNED)
        if document["state"] == "failed":
            raise typer.Exit(POLICY_FAILED)


def _describe(document: dict[str, Any], known: int) -> str:
    lines = []
    for record in document["checkpoints"]:
        figures = record["figures"]
        rates = "  ".join(f"{label.upper()} {figures[label]['rate'] or 0:.2%}" for label in ("vm", "fm", "bm"))
        state = "passed" if record["passed"] else "FAILED"
        lines.append(f"{state:<13} {record['name']}   {rates}   severity {figures['severity'] or 0:.3f}")
        lines += [f"              {rule['message']}" for rule in record["policy"] if rule["state"] == "failed"]
    lines += [f"not scanned   {name}   {line}" for name, line in document["errors"].items()]
    if not lines:
        lines.append(f"nothing new   {known} checkpoints scanned before")
    if known:
        lines.append(f"trend         {document['out'].rstrip('/')}/trend.html")
    return "\n".join(lines)
