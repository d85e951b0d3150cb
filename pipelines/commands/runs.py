"""This module is the command `memscan runs`, which lists the runs below a folder in one table."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, guarded, show


def runs(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Look for runs in this folder, local or s3://.")
    ] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder with name, model, state, rates and date."""
    with guarded():
        from pipelines.scan.listing import describe_runs, list_runs

        found = list_runs(folder)
        show(json.dumps(found, indent=2) if as_json else describe_runs(found))
