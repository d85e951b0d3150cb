"""This module is the command `memscan export`, which writes the evidence of a run as image files with a manifest."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, RunPath, guarded, show


def export(
    run: RunPath,
    out: Annotated[str, typer.Option(metavar="DIR", help="Write into this new folder.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS", help="Write only prompts of this class: VM, FM or BM. It may be given several times."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Write only the N most severe prompts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the evidence of a reduced run as PNG pairs with a manifest of hashes, in the layout of an image folder."""
    with guarded(run):
        from pipelines.reduce.export import export_run

        manifest = export_run(run, out, label or (), limit)
        if as_json:
            show(json.dumps(manifest, indent=2))
            return
        show(
            f"written       {manifest['generations']:,} generations and {manifest['training_images']:,} training images"
        )
        show(f"prompts       {manifest['prompts']:,}   without pictures {len(manifest['without']):,}")
        show(f"manifest      {out}/manifest.json")
