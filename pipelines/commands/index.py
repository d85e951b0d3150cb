"""`memscan index`: reference indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import Overrides, World, configuration, guarded, show

app = typer.Typer(help="Reference indexes.", no_args_is_help=True)


@app.command("build")
def index_build(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Parquet with encoded images, or a folder of images.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the index.")],
    config_path: Annotated[Path | None, typer.Option("--config", help="Where segmenter and embedder stand.")] = None,
    overrides: Overrides = None,
    world: World = None,
) -> None:
    """Build a reference index once, for many runs (their index.path)."""
    with guarded(out):
        from pipelines.index import build

        places = [f"index.source={json.dumps(source)}", f"index.path={json.dumps(out)}"]
        manifest = build(configuration(config_path, [*(overrides or []), *places], world))
        show(f"index         {out} ({manifest.count:,} references)")
