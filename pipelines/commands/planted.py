"""This module has the commands `memscan planted`, which make and score worlds whose memorisation is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, RunPath, World, guarded, say, show, tell, world_folder

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
    as_json: AsJson = False,
) -> None:
    """Make a new planted world: render its images, train its models, and write them with their hashes."""
    with guarded():
        from memscan.planted.build import build_world
        from memscan.planted.world import shipped_world

        begin = Path(world_folder(start_from) or shipped_world()) if start_from else None
        build_world(seed, out, minutes=minutes, device=device, start_from=begin, progress=say)
        tell(as_json, {"world": str(out), "seed": seed}, [f"world         {out}"])


@app.command("lora")
def planted_lora(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write the versions of the LoRA into this folder.")],
    world: World = None,
    steps: Annotated[
        int, typer.Option(min=2, help="Train for so many steps; about 180 take a minute on one core.")
    ] = 480,
    seed: Annotated[int, typer.Option(help="This is the seed of the training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA that memorises one ordinary image of a world, and write it before, in the middle and at the end."""
    with guarded():
        from memscan.planted.lora import LoraTraining, ordinary_image, train_lora

        folder = world_folder(world)
        files = train_lora(out, folder, LoraTraining(steps=steps, seed=seed), progress=say)
        target = ordinary_image(folder)
        answer = {
            "files": [str(file) for file in files],
            "reference_id": target.reference_id,
            "caption": target.caption,
        }
        lines = [f"versions      {len(files)} in {out}", f"memorises     {target.reference_id}, {target.caption}"]
        tell(as_json, answer, lines)


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
    as_json: AsJson = False,
) -> None:
    """Choose thresholds on a scanned world; do not use them for results about that world."""
    with guarded(run):
        from memscan.planted.score import calibrate_run

        found = calibrate_run(run, world_folder(world), max_false_positive_rate=max_false_positive_rate)
        found.save(out)
        names = ("foreground_threshold", "background_threshold", "macro_f1", "false_positive_rate")
        foreground, background, f1, wrong = (getattr(found, name) for name in names)
        answer = {"file": out, **dict(zip(names, (foreground, background, f1, wrong), strict=True))}
        lines = [f"thresholds    foreground {foreground:g}   background {background:g}"]
        tell(as_json, answer, [*lines, f"achieved      macro-F1 {f1:.3f}   false positives {wrong:.4f}   {out}"])
