"""This module is the command `memscan diff`, which shows what changed between two runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from memscan.errors import ConfigError
from pipelines.commands.shared import AsJson, Blur, NoImages, guarded, images_of, show


def diff(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="This is the earlier run; it must be reduced.")],
    after: Annotated[
        str,
        typer.Argument(metavar="RUN_B", help="This is the later run; it must be reduced and have the same prompts."),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write diff.html, diff.json and changes.csv into this folder.")
    ] = None,
    draw: Annotated[
        bool,
        typer.Option(
            "--draw",
            help="Draw what a scan did not keep, since it is not memorised, anew by that run's model and seeds. "
            "Without it, such a picture is left out of the page.",
        ),
    ] = False,
    no_images: NoImages = False,
    blur: Blur = False,
    as_json: AsJson = False,
) -> None:
    """Compare two reduced runs, and show which prompts are newly flagged, no longer flagged, or have another label.

    Rates are compared on the prompts that both runs have, with a paired test (McNemar).
    """
    with guarded():
        from memscan.census.diff import KINDS, table
        from pipelines.reduce.diff import diff_runs, write_diff

        shown = images_of(no_images, blur)
        if draw and (out is None or shown == "none"):
            raise ConfigError("--draw needs a page with pictures", hint="give --out DIR, and leave --no-images out")
        found = diff_runs(before, after, pictures=bool(out) and shown != "none", draw=draw)
        paths = write_diff(out, found, show=shown) if out else []
        if as_json:
            show(json.dumps({**found.document, "changes": found.changes.to_pylist()}, ensure_ascii=False))
            return
        show(table(found.document))
        for kind, words in KINDS.items():
            show(f"{words:20}{found.document['counts'][kind]:>8,}")
        for name, (one, other) in found.document["settings"].items():
            show(f"not alike           {name}: {one}, then {other}")
        if paths:
            show(f"page                {paths[-1]}")
