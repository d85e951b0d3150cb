"""The `memscan` command. It picks and overrides; what a run is stands in its configuration.

A user's mistake is one line on standard error and exit code 2; Ctrl-C is one line and 130; anything unexpected leaves
its traceback in the run's logs (MEMSCAN_DEBUG=1 shows it) and exits with 1. Results go to standard output, the story of
the run to standard error. Heavy modules are imported inside the commands, so that `memscan --help` is quick.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from memscan.errors import ConfigError
from pipelines.commands import compare, diff, evaluate, index, mitigate, nightly, plan, planted, submit
from pipelines.commands.shared import (
    AsJson,
    ConfigPath,
    Overrides,
    RunPath,
    World,
    configuration,
    guarded,
    say,
    show,
    world_folder,
)
from pipelines.ray.logs import LogFormat, speak

NoImages = Annotated[bool, typer.Option("--no-images", help="Leave all pictures out of the report.")]
Blur = Annotated[bool, typer.Option("--blur", help="Blur the report's pictures until they are pointed at.")]

app = typer.Typer(
    name="memscan",
    help="A census of memorisation for text-to-image diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(planted.app, name="planted")
app.add_typer(index.app, name="index")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(mitigate.patch, name="patch")
app.command("compare")(compare.compare)
app.command("diff")(diff.diff)
app.command("plan")(plan.plan)
app.command("submit")(submit.submit)
app.command("nightly")(nightly.nightly)
app.command("mitigate")(mitigate.mitigate)
app.command("verify")(mitigate.verify)


@app.callback()
def speaking(
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="MEMSCAN_LOG_FORMAT", help="Of standard error: lines for people, or JSON objects."),
    ] = LogFormat.TEXT,
) -> None:
    speak(log_format)


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Run folder.")] = "runs/demo",
    world: World = None,
) -> None:
    """Scan the planted world, reduce, report, and compare with what is known to be planted."""
    with guarded(out):
        from memscan.planted.score import score_run
        from memscan.planted.world import shipped_world, world_config
        from pipelines.reduce.job import reduce_run
        from pipelines.scan.job import scan as run_scan

        started = time.monotonic()
        folder = world_folder(world)
        config = world_config(folder, out=out)
        run_scan(config, say)
        document = reduce_run(out)
        score = score_run(out, folder or shipped_world())
        _print_score(score)
        show(f"flagged list  {out}/flagged/flagged.csv ({document['counts']['flagged']} prompts)")
        show(f"report        {out}/report.html")
        say(f"{time.monotonic() - started:.0f} s in all")


@app.command()
def scan(config_path: ConfigPath = None, overrides: Overrides = None, world: World = None) -> None:
    """Run a census, or what is left of it: the same command resumes a run that was stopped."""
    where: list[str] = []  # the run folder, once it is known
    with guarded(where):
        from pipelines.scan.job import scan as run_scan

        config = configuration(config_path, overrides, world)
        where.append(config.out)
        counts = run_scan(config, say)
        labels = "  ".join(f"{label} {count:,}" for label, count in counts.to_json()["labels"].items())
        show(f"complete      {counts.rows:,} prompts ({counts.inputs:,} input rows)")
        show(f"done          {counts.done:,}   rejected {counts.rejected:,}")
        for reason, count in (counts.reasons or {}).items():
            show(f"              {reason} {count:,}")
        show(f"generations   {counts.generations:,}   {labels}")
        show(f"next          memscan reduce {config.out}")


@app.command()
def retry(
    run: RunPath,
    reason: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Only rows with this reason.")] = None,
) -> None:
    """Try the rejected rows of a complete run again."""
    with guarded(run):
        from pipelines.scan.retry import retry as run_retry

        found = run_retry(run, reason or (), say)
        show(f"tried again   {found.rows:,}")
        show(f"done          {found.counts.done:,}   rejected {found.counts.rejected:,}")
        if found.rows:
            show(f"next          memscan reduce {run}")


@app.command()
def reduce(
    run: RunPath,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a run that is not complete.")] = False,
    config_path: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Take verdict and clusters from here, not from the scan."),
    ] = None,
    no_images: NoImages = False,
    blur: Blur = False,
) -> None:
    """Prompt verdicts, rates, clusters, flagged list, removal list and report of a scanned run."""
    with guarded(run):
        from memscan.config import load_config
        from pipelines.reduce.job import reduce_run

        other = load_config(config_path) if config_path else None
        document = reduce_run(
            run,
            partial=partial,
            verdict=other.verdict if other else None,
            clusters=other.clusters if other else None,
            images=_images(no_images, blur),
        )
        counts = document["counts"]
        show(f"flagged       {counts['flagged']:,} of {counts['done']:,} prompts   {run}/flagged/flagged.csv")
        show(f"clusters      {document['clusters']['count']:,}   {run}/clusters/clusters.parquet")
        show(f"to remove     {run}/flagged/removal.csv")
        show(f"figures       {run}/census.json")
        show(f"report        {run}/report.html")


@app.command()
def report(run: RunPath, no_images: NoImages = False, blur: Blur = False) -> None:
    """Write a reduced run's report anew."""
    with guarded(run):
        from pipelines.reduce.job import report_run

        show(report_run(run, images=_images(no_images, blur)))


@app.command()
def status(run: RunPath, as_json: AsJson = False) -> None:
    """State, counts and progress of a run, while it runs and after."""
    with guarded(run):
        from pipelines.scan.status import describe, run_status

        found = run_status(run)
        show(json.dumps(found, indent=2) if as_json else describe(found))


@app.command()
def doctor(
    config_path: ConfigPath = None, overrides: Overrides = None, world: World = None, as_json: AsJson = False
) -> None:
    """What is installed, which devices there are, and whether models and references are whole."""
    with guarded():
        from pipelines.doctor import describe, examine

        config = configuration(config_path, overrides, world) if config_path or world else None
        findings = examine(config)
        if as_json:
            show(json.dumps([finding.to_json() for finding in findings], indent=2))
        else:
            show(describe(findings))
        if any(finding.state == "bad" for finding in findings):
            raise typer.Exit(1)


def _images(no_images: bool, blur: bool) -> Literal["show", "blur", "none"]:
    if no_images and blur:
        raise ConfigError("--no-images leaves nothing to blur", hint="give one of both")
    return "none" if no_images else "blur" if blur else "show"


def _print_score(score: Mapping[str, Any]) -> None:
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "false_positive_rate": "false positives",
        "match_precision": "match precision",
        "match_recall": "match recall",
    }
    shown = "   ".join(f"{name} {score[key]:.3f}" for key, name in names.items() if score.get(key) is not None)
    show(f"against truth {score.get('prompts', 0):,} prompts   {shown}")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="memscan")


if __name__ == "__main__":
    main()
