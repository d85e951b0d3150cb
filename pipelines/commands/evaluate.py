"""This module has the commands `memscan evaluate`, which measure methods on data whose truth is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from memscan.errors import ConfigError
from pipelines.commands.compare import Variant
from pipelines.commands.shared import (
    AsJson,
    Overrides,
    RunPath,
    World,
    another_world,
    configuration,
    guarded,
    say,
    show,
    world_folder,
)

app = typer.Typer(help="Measure how correct the methods are on data whose truth is known.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure how correct the methods are on data whose truth is known."""


@app.command("metric")
def metric(
    variants: Annotated[
        list[Variant] | None,
        typer.Option(
            "--variant",
            help="Measure this variant. It may be given several times. Without it, all variants are measured.",
        ),
    ] = None,
    canvas: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Use a canvas with this side, in pixels. Without it, it is 128, or 176 for paper and release, which "
            "is their smallest.",
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Render pictures with this side, in pixels.")] = 64,
    count: Annotated[int, typer.Option(min=4, help="Make this number of pairs of each label and family.")] = 100,
    seed: Annotated[int, typer.Option(help="This is the seed of the pairs for which results are reported.")] = 1,
    calibration_seed: Annotated[
        int, typer.Option(help="This is the seed of the pairs on which the thresholds are chosen.")
    ] = 1001,
    max_false_positive_rate: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Choose thresholds whose rate of false positives is at most this, with 95 % confidence.",
        ),
    ] = 0.01,
    save_calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the thresholds of each variant into this folder, as VARIANT-CANVAS.json."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure FB-Mem's variants on rendered pairs and photographs: labels, corruptions, and unrelated silhouettes."""
    with guarded():
        import torch

        from memscan.config import parse_metric
        from memscan.evaluation.tables import metric_tables
        from memscan.evaluation.variants import evaluate_metric

        torch.set_num_threads(1)  # hundreds of small operations per pair: a second thread costs more than it gives
        open_thresholds = {"foreground_threshold": 0.5, "background_threshold": 0.5}
        chosen = {
            variant.value: parse_metric(
                {"variant": variant.value, "canvas": canvas or _smallest(variant), **open_thresholds},
                where="--variant, --canvas",
            )
            for variant in variants or list(Variant)
        }
        document, calibrations = evaluate_metric(
            chosen,
            seed=seed,
            calibration_seed=calibration_seed,
            count=count,
            size=size,
            bound=max_false_positive_rate,
            progress=say,
        )
        if save_calibration is not None:
            save_calibration.mkdir(parents=True, exist_ok=True)
            for name, found in calibrations.items():
                found.save(str(save_calibration / f"{name}-{found.canvas}.json"))
        show(json.dumps(document, indent=2) if as_json else metric_tables(document))


Calibration = Annotated[
    str | None,
    typer.Option("--calibrate-on", metavar="DIR", help="Choose thresholds on this other planted world."),
]


@app.command("detectors")
def detectors(
    world: World = None,
    calibrate_on: Calibration = None,
    seeds: Annotated[int, typer.Option(min=1, help="Take the mean of a score over this number of seeds.")] = 4,
    first_step: Annotated[
        bool, typer.Option("--first-step", help="Measure only the detectors that need no generation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure on a planted world how well detectors tell whether a prompt is memorised."""
    with guarded():
        from memscan.evaluation.detectors import detector_table, evaluate_detectors

        document = evaluate_detectors(
            world_folder(world),
            another_world(calibrate_on),
            seeds=seeds,
            sampled=not first_step,
            progress=say,
        )
        show(json.dumps(document, indent=2) if as_json else detector_table(document))


@app.command("localization")
def localization(
    world: World = None,
    calibrate_on: Calibration = None,
    probes: Annotated[int, typer.Option(min=1, help="The number of probes of Hutchinson's estimator.")] = 16,
    seeds: Annotated[int, typer.Option(min=2, help="The number of generations per prompt.")] = 4,
    masks: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv",
            help="Captions and masks of your own in place of a planted world's, with the columns caption and mask: an "
            "image file, white where generations are memorised, or nothing for a caption that is not memorised.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="CONFIG.yaml", help="The configuration of the checkpoint that --masks is for.")
    ] = None,
    calibrate_masks: Annotated[
        str | None,
        typer.Option(metavar="FILE.csv", help="Other captions and masks of that checkpoint, which fix the thresholds."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well localisation maps tell where in the image memorisation is: on a planted world, or on masks."""
    with guarded():
        from memscan.evaluation.localization import evaluate_localization, evaluate_maps, localization_table

        numbers = {"probes": probes, "seeds": seeds}
        if masks is None:
            if config is not None or calibrate_masks is not None:
                raise ConfigError("--config and --calibrate-masks belong to --masks")
            other = another_world(calibrate_on)
            document = evaluate_localization(world_folder(world), other, **numbers, progress=say)
        else:
            from memscan.evaluation.subjects import masked_subject

            if calibrate_on is not None:
                raise ConfigError("--calibrate-on belongs to planted worlds", hint="give --calibrate-masks")
            if calibrate_masks == masks:
                raise ConfigError("thresholds are fixed on other captions", where="--calibrate-masks")
            rule = configuration(config, None, world).generator
            others = None if calibrate_masks is None else masked_subject(rule, calibrate_masks)
            document = evaluate_maps(masked_subject(rule, masks), others, **numbers, progress=say)
        show(json.dumps(document, indent=2) if as_json else localization_table(document))


class Encoder(str, Enum):
    """These are the kinds of text encoders."""

    MODEL = "model"
    SENTENCE = "sentence"
    WORDS = "words"


@app.command("clusters")
def clusters(
    source: Annotated[
        str, typer.Argument(metavar="PROMPTS|RUN", help="This is a prompt file or, with --world, a reduced run.")
    ],
    world: Annotated[
        str | None, typer.Option(metavar="DIR", help="This is the folder of the run's planted world, or `shipped`.")
    ] = None,
    encoder: Annotated[
        Encoder, typer.Option(help="Turn captions into vectors with this encoder, as clusters.encoder does.")
    ] = Encoder.WORDS,
    path: Annotated[
        str | None,
        typer.Option(help="This is the checkpoint or sentence encoder: a local folder, or a hub id with --revision."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="This is the commit of a hub id.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The published clusters are in this column of the prompt file.")
    ] = None,
    subsamples: Annotated[int, typer.Option(min=2, help="Compare this number of pairs of subsamples.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Measure how stable the clusters of a prompt list are, or how well those of a planted run agree with the truth."""
    with guarded():
        from memscan.evaluation.clusters import agreement_table, stability_table
        from pipelines.evaluate.clusters import agreement_of_run, stability_of_prompts

        if world is not None:
            found = agreement_of_run(source, another_world(world))
            show(json.dumps(found, indent=2) if as_json else agreement_table(found))
            return
        document = stability_of_prompts(source, encoder.value, path, revision, labels, subsamples)
        show(json.dumps(document, indent=2) if as_json else stability_table(document))


@app.command("screen")
def screen(
    run: RunPath,
    detector: Annotated[
        str, typer.Option(help="Screen with this detector of the first step; see docs/detection.md.")
    ] = "noise_norm",
    timestep: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=999.0,
            help="Screen at this timestep. Without it, it is the first timestep of the sampling, which then reuses "
            "this step.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Screen each prompt with this number of seeds.")] = 4,
    target: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep this recall with 95 % confidence.")] = 0.99,
    as_json: AsJson = False,
) -> None:
    """Choose the threshold of a screen so that it catches the flagged prompts of a reduced run without a screen."""
    with guarded(run):
        from memscan.config import ScreenConfig, parse_section
        from pipelines.evaluate.screen import threshold_of_run

        values = {"threshold": 0.0, "detector": detector, "timestep": timestep, "seeds": seeds}
        rule = parse_section(ScreenConfig, values, where="--detector, --timestep, --seeds")
        found = threshold_of_run(run, rule, target=target)
        if as_json:
            show(json.dumps({**values, **asdict(found)}, indent=2))
            return
        passed = "" if found.passed is None else f"   passes {found.passed:.1%} of {found.ordinary:,} others"
        show(f"threshold     {found.threshold:.6g}{passed}")
        show(
            f"recall        {found.recall:.4f} of {found.memorised:,} flagged prompts, at least {found.recall_low:.4f}"
        )
        if not found.reached:
            say(f"memscan: too few flagged prompts to show a recall of {target:g}: the threshold catches all of them")


@app.command("sampling")
def sampling(
    run: RunPath,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            help="Measure this mode: fast, bfloat16, float16, solver, late-guidance or cached. It may be given "
            "several times. Without it, all modes are measured.",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="Draw this number of prompts at random; 0 takes all prompts.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="This is the seed of that draw.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure on a run's prompts whether faster modes of sampling give the same verdicts as plain float32."""
    with guarded(run):
        from memscan.errors import ConfigError
        from memscan.evaluation.sampling import MODES, agreement_table
        from pipelines.evaluate.sampling import measure_agreement

        names = modes or list(MODES)
        for name in names:
            if name not in MODES:
                raise ConfigError(f"no mode {name!r}", where="--mode", hint=f"one of {', '.join(MODES)}")
        document = measure_agreement(run, names, overrides=overrides or (), prompts=prompts, seed=seed, progress=say)
        show(json.dumps(document, indent=2) if as_json else agreement_table(document))


@app.command("locality")
def locality(
    run: RunPath,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the page into this folder. Without it, it is RUN/verified.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use this number of workers. Without it, there is one worker per GPU, or one per CPU core if there "
            "is no GPU.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, for example images=6; docs/configuration.md lists the settings.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether the memorisation of one image is in one place: in embeddings, activations and weights."""
    with guarded(run):
        from memscan.mitigation.settings import LocalitySettings
        from memscan.report.locality import table
        from pipelines.commands.mitigate import parse_settings
        from pipelines.evaluate.locality import evaluate_locality

        chosen = parse_settings(LocalitySettings, {}, settings or [])
        document = evaluate_locality(run, chosen, out, workers, say)
        if as_json:
            show(json.dumps(document, indent=2))
            return
        show(table(document))
        show(f"page          {out or f'{run}/verified'}/report.html")


def _smallest(variant: Variant) -> int:
    return 176 if variant in (Variant.PAPER, Variant.RELEASE) else 128
