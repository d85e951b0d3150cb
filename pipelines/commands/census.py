"""This module has the commands of a census: `demo`, `scan`, `status`, `reduce`, `report`, `retry`, `repair-run`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memscan.errors import ConfigError, Reason
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

if TYPE_CHECKING:
    from memscan.config import CensusConfig
    from pipelines.run_folder.tables import Counts

NoImages = Annotated[bool, typer.Option("--no-images", help="Leave all pictures out of the report.")]
Blur = Annotated[bool, typer.Option("--blur", help="Blur the pictures of the report until the mouse points at them.")]

# Exit code of a complete scan in which a model failed on more than this share of the rows, so that it proves little.
ROWS_FAILED, MOST_FAILED = 5, 0.01
MODEL_REASONS = {
    reason.value
    for reason in (
        Reason.GENERATION_FAILED,
        Reason.GENERATION_NOT_FINITE,
        Reason.SEGMENTATION_FAILED,
        Reason.EMBEDDING_FAILED,
        Reason.SEARCH_FAILED,
        Reason.CLASSIFICATION_FAILED,
        Reason.SCREEN_FAILED,
        Reason.WORKER_DIED,
    )
}


def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Write the run into this folder.")] = "runs/demo",
    world: World = None,
) -> None:
    """Take a census of the planted world, and compare its verdicts with the known truth."""
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


def scan(config_path: ConfigPath = None, overrides: Overrides = None, world: World = None) -> None:
    """Run a census, or the rest of one; the same command resumes a run that was stopped.

    The exit code is 5 if the run is complete, but the models failed on more than 1 % of its prompts or references.
    """
    where: list[str] = []  # the run folder, once it is known
    with guarded(where):
        from pipelines.run_folder.runs import Run
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
        rejects = Run.load(config.out).manifest["index"].get("rejects") or {}
        if rejects.get("rejected"):
            show(f"references    {rejects['rejected']:,} of {rejects['source_rows']:,} could not be indexed")
            for reason, count in rejects["reasons"].items():
                show(f"              {reason} {count:,}")
        show(f"next          memscan reduce {config.out}")
        _refuse_hollow(counts, config)
        failed = failed_in_models(counts.reasons or {}), failed_in_models(rejects.get("reasons") or {})
        if failed[0] > MOST_FAILED * counts.rows or failed[1] > MOST_FAILED * (rejects.get("source_rows") or 0):
            raise typer.Exit(ROWS_FAILED)


def _refuse_hollow(counts: Counts, config: CensusConfig) -> None:
    """Raise RejectedError if so many rows were rejected that the census says little about the prompts."""
    from memscan.errors import RejectedError

    share, most = counts.rejected / counts.rows if counts.rows else 0.0, config.resources.max_reject_share
    if counts.rejected and (share > most or counts.done == 0):
        reason = max((counts.reasons or {}).items(), key=lambda item: item[1])[0]
        raise RejectedError(
            f"{counts.rejected:,} of {counts.rows:,} prompts were rejected, most as {reason} (exit code 3: "
            + ("all of them" if counts.done == 0 else f"more than resources.max_reject_share, {most:g}")
            + ")",
            where=config.out,
            hint="see rejects/ for the messages; `memscan retry` tries them again once the cause is mended",
        )


def repair_run(run: RunPath) -> None:
    """Repair a run whose files are damaged, duplicated or foreign, and do the rows again that this loses."""
    with guarded(run):
        from pipelines.run_folder.runs import Run
        from pipelines.scan.job import scan as run_scan
        from pipelines.scan.repair import mend

        found = mend(run, say)
        for number in found.prompts:
            show(f"made again    the prompts of part {number}")
        for path, why in found.dropped.items():
            show(f"dropped       {path}: {why}")
        for number, rows in found.rows.items():
            show(f"do again      part {number}: {rows:,} rows")
        if found.rows:
            run_scan(Run.load(run).config(), say)
        if not found.dropped and not found.prompts:
            show("sound         nothing was dropped")
        elif found.rows:
            show(f"next          memscan reduce {run}")


def failed_in_models(reasons: Mapping[str, int]) -> int:
    """Count the rows that a model could not process; rows whose input was damaged are not counted."""
    return sum(count for reason, count in reasons.items() if reason in MODEL_REASONS)


def retry(
    run: RunPath,
    reason: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Try only the rows with this reason. It may be given several times."),
    ] = None,
) -> None:
    """Try the rejected rows of a complete run again."""
    with guarded(run):
        from pipelines.scan.retry import retry as run_retry

        found = run_retry(run, reason or (), say)
        show(f"tried again   {found.rows:,}")
        show(f"done          {found.counts.done:,}   rejected {found.counts.rejected:,}")
        if found.rows:
            show(f"next          memscan reduce {run}")
            _refuse_hollow(found.counts, found.config)


def reduce(
    run: RunPath,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a run that is not complete.")] = False,
    config_path: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Take the sections verdict and clusters from this configuration, and not from that of the scan.",
        ),
    ] = None,
    review: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Add the verdicts of a review.json, as the report saves it, to the results. It may be given several "
            "times.",
        ),
    ] = None,
    no_images: NoImages = False,
    blur: Blur = False,
) -> None:
    """Make verdicts, rates, clusters, the flagged list, the removal list and the report of a scanned run."""
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
            reviews=review or (),
        )
        counts = document["counts"]
        show(f"flagged       {counts['flagged']:,} of {counts['done']:,} prompts   {run}/flagged/flagged.csv")
        show(f"clusters      {document['clusters']['count']:,}   {run}/clusters/clusters.parquet")
        show(f"to remove     {run}/flagged/removal.csv")
        if found := document.get("review"):
            parts = ", ".join(f"{found[name]:,} {name}" for name in ("confirmed", "dismissed", "unsure"))
            show(f"reviewed      {found['reviewed']:,} prompts: {parts}")
        show(f"figures       {run}/census.json")
        show(f"report        {run}/report.html")


def report(run: RunPath, no_images: NoImages = False, blur: Blur = False) -> None:
    """Write the report of a reduced run again."""
    with guarded(run):
        from pipelines.reduce.job import report_run

        show(report_run(run, images=_images(no_images, blur)))


def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show state, counts and progress of a run, while it runs and afterwards."""
    with guarded(run):
        from pipelines.scan.status import describe, run_status

        found = run_status(run)
        show(json.dumps(found, indent=2) if as_json else describe(found))


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
