"""`memscan inspect`: how prompts or references would be read, before a run."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, Overrides, guarded, show


class Kind(str, Enum):
    """What paths hold."""

    AUTO = "auto"
    PROMPTS = "prompts"
    REFERENCES = "references"


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Files, folders or patterns of prompts or of references, local or s3://."
        ),
    ],
    kind: Annotated[
        Kind, typer.Option("--as", help="What the paths hold; auto takes images, tars and vectors as references.")
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
