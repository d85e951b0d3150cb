"""This module is the command `memscan inspect`, which shows before a run how prompts or references are read."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, Overrides, guarded, show


class Kind(str, Enum):
    """This is the kind of content that paths hold."""

    AUTO = "auto"
    PROMPTS = "prompts"
    REFERENCES = "references"


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="These are files, folders or patterns of prompts or of references, local or s3://."
        ),
    ],
    kind: Annotated[
        Kind,
        typer.Option("--as", help="Read the paths as this kind; auto takes images, tars and vectors as references."),
    ] = Kind.AUTO,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how prompts or references are read: files taken and not taken, columns, rows and rejects; loads no model."""
    with guarded():
        from memscan.config.reading import apply_override
        from memscan.errors import ConfigError
        from memscan.inspection import inspect_paths, lines

        data: dict[str, dict[str, object]] = {"prompts": {}, "index": {}}
        for override in overrides or ():
            if override.partition(".")[0] not in data:
                raise ConfigError(f"{override!r} is about neither prompts nor index", where="--set")
            apply_override(data, override)
        facts = inspect_paths(paths, data["prompts"], data["index"], kind=None if kind is Kind.AUTO else kind.value)
        if as_json:
            show(json.dumps(facts, ensure_ascii=False))
            return
        for line in lines(facts):
            show(line)
