"""This module has the commands `memscan planted`, which make and score worlds whose memorisation is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import RunPath, World, guarded, say, show, world_folder

app = typer.Typer(help="Build, score and calibrate small worlds whose memorisation is known.", no_args_is_help=True)


@app.command("build")
def planted_build(
    seed: Annotated[
        int, typer.Option(help="This is the seed of the world; another seed gives other images, captions and groups.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write the world into this folder.")],
    minutes: Annotated[float, typer.Option(help="Train for this time, in minutes.")] = 55.0,
    device: Annotated[str, typer.Option(help="Train on this device: auto, cpu or cuda.")] = "auto",
    start_from: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help='Start the training from the weights of the world in this folder, or of "shipped".'
        ),
    ] = None,
) -> None:
    """Make a new planted world: render its images, train its models, and write them with their hashes."""
    with guarded():
        from memscan.planted.build import build_world
        from memscan.planted.world import shipped_world

        begin = Path(world_folder(start_from) or shipped_world()) if start_from else None
        build_world(seed, out, minutes=minutes, device=device, start_from=begin, progress=say)
        show(f"world         {out}")


@app.command("score")
def planted_score(run: RunPath, world: World = None) -> None:
    """Compare a reduced run with the ground truth, as one JSON object on standard output."""
    with guarded(run):
        from memscan.planted.score import score_run
        from memscan.planted.world import shipped_world

        show(json.dumps(score_run(run, world_folder(world) or shipped_world())))


@app.command("calibrate")
def planted_calibrate(
    run: RunPath,
    out: Annotated[str, typer.Option(metavar="FILE.json", help="Write the thresholds to this file.")],
    world: World = None,
    max_false_positive_rate: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Choose thresholds with which at most this share of ordinary generations gets a label other than NM, "
            "with 95 % confidence.",
        ),
    ] = 0.005,
) -> None:
    """Choose thresholds on a scanned world; do not use them for results about that world."""
    with guarded(run):
        from memscan.planted.score import calibrate_run

        found = calibrate_run(run, world_folder(world), max_false_positive_rate=max_false_positive_rate)
        found.save(out)
        show(f"thresholds    foreground {found.foreground_threshold:g}   background {found.background_threshold:g}")
        show(f"achieved      macro-F1 {found.macro_f1:.3f}   false positives {found.false_positive_rate:.4f}   {out}")
