"""This module has the commands of a census: `demo`, `scan`, `status`, `reduce`, `report`, `retry`, `repair-run`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memscan.errors import Reason
from pipelines.commands import track
from pipelines.commands.shared import (
    AsJson,
    Blur,
    ConfigPath,
    NoImages,
    Overrides,
    RunPath,
    Track,
    World,
    configuration,
    guarded,
    images_of,
    say,
    show,
    tell,
    world_folder,
)

if TYPE_CHECKING:
    from memscan.config import CensusConfig
    from pipelines.run_folder.tables import Counts

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
    as_json: AsJson = False,
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
        flagged, page = f"{out}/flagged/flagged.csv", f"{out}/report.html"
        answer = {"run": out, "counts": document["counts"], "score": score, "flagged": flagged, "report": page}
        shown = f"flagged list  {flagged} ({document['counts']['flagged']} prompts)"
        tell(as_json, answer, [_score_line(score), shown, f"report        {page}"])
        say(f"{time.monotonic() - started:.0f} s in all")


def scan(
    config_path: ConfigPath = None,
    overrides: Overrides = None,
    world: World = None,
    tracker: Track = None,
    as_json: AsJson = False,
) -> None:
    """Run a census, or the rest of one; the same command resumes a run that was stopped.

    The exit code is 5 if the run is complete, but the models failed on more than 1 % of its prompts or references.
    """
    where: list[str] = []  # the run folder, once it is known
    with guarded(where):
        from pipelines.run_folder.runs import Run
        from pipelines.scan.job import scan as run_scan

        track.check(tracker)
        config = configuration(config_path, overrides, world)
        where.append(config.out)
        counts = run_scan(config, say)
        run = Run.load(config.out)
        rejects = run.manifest["index"].get("rejects") or {}
        answer = {"run": config.out, "fingerprint": run.manifest["fingerprint"], "counts": counts.to_json()}
        tell(as_json, {**answer, "references": rejects}, _scanned(counts, rejects, config.out))
        track.tell(tracker, track.of_scan(config, run.fingerprint, counts.to_json()), say)
        _refuse_hollow(counts, config)
        failed = failed_in_models(counts.reasons or {}), failed_in_models(rejects.get("reasons") or {})
        if failed[0] > MOST_FAILED * counts.rows or failed[1] > MOST_FAILED * (rejects.get("source_rows") or 0):
            raise typer.Exit(ROWS_FAILED)


def _scanned(counts: Counts, rejects: Mapping[str, Any], out: str) -> list[str]:
    labels = "  ".join(f"{label} {count:,}" for label, count in counts.to_json()["labels"].items())
    lines = [
        f"complete      {counts.rows:,} prompts ({counts.inputs:,} input rows)",
        f"done          {counts.done:,}   rejected {counts.rejected:,}",
        *(f"              {reason} {count:,}" for reason, count in (counts.reasons or {}).items()),
        f"generations   {counts.generations:,}   {labels}",
    ]
    if rejects.get("rejected"):
        lines.append(f"references    {rejects['rejected']:,} of {rejects['source_rows']:,} could not be indexed")
        lines += [f"              {reason} {count:,}" for reason, count in rejects["reasons"].items()]
    return [*lines, f"next          memscan reduce {out}"]


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
            hint="see rejects/ for the messages; `memscan retry` tries them again once the cause is corrected",
        )


def repair_run(run: RunPath, as_json: AsJson = False) -> None:
    """Repair a run whose files are damaged, duplicated or foreign, and do the rows again that this loses."""
    with guarded(run):
        from pipelines.run_folder.runs import Run
        from pipelines.scan.job import scan as run_scan
        from pipelines.scan.repair import mend

        found = mend(run, say)
        lines = [f"made again    the prompts of part {number}" for number in found.prompts]
        lines += [f"dropped       {path}: {why}" for path, why in found.dropped.items()]
        lines += [f"do again      part {number}: {rows:,} rows" for number, rows in found.rows.items()]
        if found.rows:
            run_scan(Run.load(run).config(), say)
        if not found.dropped and not found.prompts:
            lines.append("sound         nothing was dropped")
        elif found.rows:
            lines.append(f"next          memscan reduce {run}")
        answer = {"run": run, "prompts": list(found.prompts), "dropped": dict(found.dropped), "rows": dict(found.rows)}
        tell(as_json, answer, lines)


def failed_in_models(reasons: Mapping[str, int]) -> int:
    """Count the rows that a model could not process; rows whose input was damaged are not counted."""
    return sum(count for reason, count in reasons.items() if reason in MODEL_REASONS)


def retry(
    run: RunPath,
    reason: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Try only the rows with this reason. It may be given several times."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try the rejected rows of a complete run again."""
    with guarded(run):
        from pipelines.scan.retry import retry as run_retry

        found = run_retry(run, reason or (), say)
        lines = [f"tried again   {found.rows:,}"]
        lines.append(f"done          {found.counts.done:,}   rejected {found.counts.rejected:,}")
        lines += [f"next          memscan reduce {run}"] if found.rows else []
        tell(as_json, {"run": run, "tried_again": found.rows, "counts": found.counts.to_json()}, lines)
        if found.rows:
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
    tracker: Track = None,
    as_json: AsJson = False,
) -> None:
    """Make verdicts, rates, clusters, the flagged list, the removal list and the report of a scanned run."""
    with guarded(run):
        from memscan.config import load_config
        from pipelines.reduce.job import reduce_run

        track.check(tracker)
        other = load_config(config_path) if config_path else None
        document = reduce_run(
            run,
            partial=partial,
            verdict=other.verdict if other else None,
            clusters=other.clusters if other else None,
            images=images_of(no_images, blur),
            reviews=review or (),
        )
        counts = document["counts"]
        lines = [
            f"flagged       {counts['flagged']:,} of {counts['done']:,} prompts   {run}/flagged/flagged.csv",
            f"clusters      {document['clusters']['count']:,}   {run}/clusters/clusters.parquet",
            f"to remove     {run}/flagged/removal.csv",
        ]
        if found := document.get("review"):
            parts = ", ".join(f"{found[name]:,} {name}" for name in ("confirmed", "dismissed", "unsure"))
            lines.append(f"reviewed      {found['reviewed']:,} prompts: {parts}")
        lines += [f"figures       {run}/census.json", f"report        {run}/report.html"]
        tell(as_json, document, lines)
        track.tell(tracker, track.of_reduce(run, document), say)


def report(run: RunPath, no_images: NoImages = False, blur: Blur = False, as_json: AsJson = False) -> None:
    """Write the report of a reduced run again."""
    with guarded(run):
        from pipelines.reduce.job import report_run

        path = report_run(run, images=images_of(no_images, blur))
        tell(as_json, {"run": run, "report": path}, [path])


def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show state, counts and progress of a run, while it runs and afterwards."""
    with guarded(run):
        from pipelines.scan.status import describe, run_status

        found = run_status(run)
        show(json.dumps(found, indent=2) if as_json else describe(found))


def _score_line(score: Mapping[str, Any]) -> str:
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "false_positive_rate": "false positives",
        "match_precision": "match precision",
        "match_recall": "match recall",
    }
    shown = "   ".join(f"{name} {score[key]:.3f}" for key, name in names.items() if score.get(key) is not None)
    return f"against truth {score.get('prompts', 0):,} prompts   {shown}"
