"""This module makes prompt verdicts, rates, groups, the flagged list and the report from census rows.

    census/**.parquet ──▶ judge ──▶ add tallies, ──▶ group: URLs, near- ──▶ flagged/*, clusters/*, ──▶ census.json
    (one row per prompt)  (judging)  join flagged     duplicates, clusters   report.html                (the switch:
                                     (driver)         (grouping)             (report)                    outputs.py)

Evidence images stay where they are: judging reads no pixel, and the report fetches those of the prompts that it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from memscan.census import flagged as flagged_files
from memscan.census.review import read_reviews, summarise_review
from memscan.census.signals import not_applicable
from memscan.census.summary import summarise
from memscan.census.verdict import harm_of
from memscan.config import ClustersConfig, VerdictConfig, shipped_rate
from memscan.intervals import CONFIDENCE
from memscan.io import storage
from memscan.planted.world import planted_world_of
from memscan.records import SCHEMA_VERSION
from memscan.report import Images
from pipelines.reduce.grouping import group_run
from pipelines.reduce.outputs import begun, switch
from pipelines.reduce.report import FORMAT, report_run, write_report
from pipelines.reduce.verdicts import judge_files, on_ray, session
from pipelines.run_folder.places import shown_config
from pipelines.run_folder.results import census_files, check_conserved
from pipelines.run_folder.runs import Run

__all__ = ["reduce_run", "report_run"]


def reduce_run(
    run_dir: str,
    *,
    partial: bool = False,
    verdict: VerdictConfig | None = None,
    clusters: ClustersConfig | None = None,
    images: Images = "show",
    use_ray: bool | None = None,
    reviews: Sequence[str] = (),
) -> dict[str, Any]:
    """Reduce a run: write flagged/, clusters/, census.json and report.html into its folder.

    Args:
        run_dir: the run folder, local or s3://.
        partial: accept a run that is not complete; everything written is then marked as partial.
        verdict: another rule than the configuration's (labels stay as scanned).
        clusters: another grouping than the configuration's.
        images: "blur" or "none" for a report that does not show the pictures.
        use_ray: work on Ray; by default only where rows are many.
        reviews: files that people saved from the report (`memscan.census.review`), set beside the machine's figures.

    Returns:
        The content of census.json.

    Raises:
        RunError: no run, not complete, or its rows do not add up to what the scan committed.
        InputError: a file is not a review, or belongs to another run.
    """
    run = Run.load(run_dir)
    judgements = read_reviews(reviews, run.manifest["fingerprint"])
    files = census_files(run, partial)
    config = run.config()
    rule, parallel = verdict or config.verdict, on_ray(run, use_ray)
    first = config.screen.first_samples if config.screen else None
    with begun(run_dir) as staged:
        with session(run, parallel):
            tally, flagged = judge_files(run, files, rule, config.metric, parallel, first)
            if run.state == "complete":
                check_conserved(run, tally)
            grouped = group_run(run, flagged, rule, clusters or config.clusters, parallel, staged)
        flagged = grouped.flagged
        labels = dict(zip(flagged["prompt_id"].to_pylist(), flagged["label"].to_pylist(), strict=True))
        document = {
            **_provenance(run, rule, partial=run.state != "complete"),
            **summarise(tally, flagged, rule, config.screen),
            "clusters": grouped.clusters,
            "references": grouped.references,
            **({"review": summarise_review(judgements, labels)} if reviews else {}),
        }
        known = run.manifest.get("generator") or {}
        absent = not_applicable(tally.signals, known, config) if tally.generations else {}
        document["signals"]["not_applicable"] = absent
        metadata = {key: str(document["run"][key]) for key in ("name", "fingerprint", "state")}
        metadata["version"] = str(document["tool"]["version"])
        flagged_files.write_flagged(storage.join(staged, "flagged"), flagged, metadata)
        write_report(run, document, staged, images)
        switch(run_dir, staged, document)
    return document


def _provenance(run: Run, rule: VerdictConfig, *, partial: bool) -> dict[str, Any]:
    manifest, config = run.manifest, run.config()
    started, ended = manifest["created"], manifest.get("completed") or manifest["updated"]
    elapsed = (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "partial": partial,
        "tool": {"name": "memscan", "version": manifest["code_version"]},
        "run": {
            "name": manifest["name"],
            "state": run.state,
            "fingerprint": manifest["fingerprint"],
            "prompts_total": int((manifest["prompts"] or {}).get("distinct", 0)),
            "started": started,
            "ended": ended,
            "duration_seconds": elapsed,
            "config": shown_config(manifest),
        },
        "models": manifest["models"],
        "index": manifest["index"],
        "method": {
            "metric": f"FB-Mem, {config.metric.variant}",
            "canvas": config.metric.canvas,
            "degenerate_area": config.metric.degenerate_area,
            "thresholds": {
                "foreground": config.metric.foreground_threshold,
                "background": config.metric.background_threshold,
                "source": config.metric.threshold_source,
                "false_positive_rate": shipped_rate(config.metric),
            },
            "synthetic": planted_world_of(config.generator.path),
            "verdict": {"min_share": rule.min_share, "harm": harm_of(rule)},
            "generator": manifest.get("generator"),  # what samples; null in runs of older versions
            "interval": f"Wilson score, {CONFIDENCE:.0%}"
            if config.screen is None
            else f"from the audit of the screen, {CONFIDENCE:.0%}",
        },
    }
