"""`memscan planted`: the embedded world whose memorisation is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import RunPath, World, guarded, say, show, world_folder

app = typer.Typer(help="The embedded world whose memorisation is known.", no_args_is_help=True)


@app.command("build")
def planted_build(
    seed: Annotated[int, typer.Option(help="Another seed is another world: other images, captions and groups.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the world.")],
    minutes: Annotated[float, typer.Option(help="Training time.")] = 55.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    start_from: Annotated[
        str | None, typer.Option(metavar="DIR", help='Start from a world\'s weights ("shipped"), not from random ones.')
    ] = None,
) -> None:
    """Make a new planted world: render, train, write with hashes."""
    with guarded():
        from memscan.planted.build import build_world
        from memscan.planted.world import shipped_world

        begin = Path(world_folder(start_from) or shipped_world()) if start_from else None
        build_world(seed, out, minutes=minutes, device=device, start_from=begin, progress=say)
        show(f"world         {out}")


@app.command("score")
def planted_score(run: RunPath, world: World = None) -> None:
    """Compare a reduced run with ground truth; one JSON object on standard output."""
    with guarded(run):
        from memscan.planted.score import score_run
        from memscan.planted.world import shipped_world

        show(json.dumps(score_run(run, world_folder(world) or shipped_world())))


@app.command("calibrate")
def planted_calibrate(
    run: RunPath,
    out: Annotated[str, typer.Option(metavar="FILE.json", help="Where the thresholds go.")],
    world: World = None,
    max_false_positive_rate: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Bound on the share of ordinary generations with a label, 95 % sure."),
    ] = 0.005,
) -> None:
    """Choose thresholds on a scanned world. Never report on that world with them."""
    with guarded(run):
        from memscan.planted.score import calibrate_run

        found = calibrate_run(run, world_folder(world), max_false_positive_rate=max_false_positive_rate)
        found.save(out)
        show(f"thresholds    foreground {found.foreground_threshold:g}   background {found.background_threshold:g}")
        show(f"achieved      macro-F1 {found.macro_f1:.3f}   false positives {found.false_positive_rate:.4f}   {out}")
