"""From census rows to decisions: prompt verdicts, rates, the flagged list, the report.

    census/**.parquet ──▶ judge one file ──▶ add tallies, join flagged ──▶ flagged/*, census.json ──▶ report.html
    (a row a prompt)      (in parallel)      (driver: counts and            (written whole,
                                              flagged rows only)             or not at all)

Evidence images stay where they are: judging reads no pixel, and the report fetches those of the prompts that it shows.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial as bind
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memscan import flagged as flagged_files
from memscan import storage
from memscan.census import CENSUS_COLUMNS, Judgement, Tally, harm_of, join_flagged, judge, summarise, with_urls
from memscan.config import MetricConfig, VerdictConfig
from memscan.errors import IndexLoadError, RunError
from memscan.index.manifest import Manifest
from memscan.rates import CONFIDENCE
from memscan.records import SCHEMA_VERSION
from memscan.report import Images, find_matches, gather_exhibits, render_report
from memscan.report.evidence import leaves
from memscan.report.page import MAX_EXHIBITS
from pipelines.runs import Run
from pipelines.session import logs_folder, ray_session
from pipelines.tables import ids_or_none

FORMAT = "memscan-census/1"
_BATCH_ROWS = 8192
_RAY_FROM = 200_000  # below so many prompts one process is done before Ray has started
_PIXELS = ("generations.list.element.evidence", "generations.list.element.candidates")


def reduce_run(
    run_dir: str,
    *,
    partial: bool = False,
    verdict: VerdictConfig | None = None,
    images: Images = "show",
    use_ray: bool | None = None,
) -> dict[str, Any]:
    """Reduce a run: write flagged/flagged.{parquet,csv,jsonl}, census.json and report.html into its folder.

    Args:
        run_dir: the run folder, local or s3://.
        partial: accept a run that is not complete; everything written is then marked as partial.
        verdict: another rule than the configuration's (labels stay as scanned).
        images: "blur" or "none" for a report that does not show the pictures.
        use_ray: judge files on Ray; by default only where they are many.

    Returns:
        The content of census.json.

    Raises:
        RunError: no run, not complete, or its rows do not add up to what the scan committed.
    """
    run = Run.load(run_dir)
    files = _census_files(run, partial)
    config = run.config()
    rule = verdict or config.verdict
    first = config.screen.first_samples if config.screen else None
    tally, flagged = _judge_files(files, rule, config.metric, run_dir, _on_ray(run, use_ray), first)
    if run.state == "complete":
        _check_conserved(run, tally)
    flagged, references = _add_urls(run, flagged)
    document = {
        **_provenance(run, rule, partial=run.state != "complete"),
        **summarise(tally, flagged, rule, config.screen),
        "references": references,
    }
    metadata = {key: str(document["run"][key]) for key in ("name", "fingerprint", "state")}
    metadata["version"] = str(document["tool"]["version"])
    flagged_files.write_flagged(storage.join(run_dir, "flagged"), flagged, metadata)
    storage.write_json(storage.join(run_dir, "census.json"), document)
    report_run(run_dir, images=images)
    return document


def report_run(run_dir: str, *, images: Images = "show") -> str:
    """Write a reduced run's report.html anew, and return its path.

    Raises:
        RunError: the run has not been reduced.
    """
    run = Run.load(run_dir)
    census_path = storage.join(run_dir, "census.json")
    if not storage.exists(census_path):
        raise RunError("the run has not been reduced (no census.json)", where=run_dir, hint="run memscan reduce first")
    census = storage.read_json(census_path)
    if census.get("format") != FORMAT or census["run"]["fingerprint"] != run.manifest["fingerprint"]:
        raise RunError("census.json is of another run or version", where=run_dir, hint="run memscan reduce again")
    flagged = flagged_files.read_parquet(storage.join(run_dir, "flagged", flagged_files.NAMES[0]))
    exhibits = gather_exhibits(
        flagged.slice(0, MAX_EXHIBITS).to_pylist(),
        _census_files(run, partial=census["partial"]),
        _reference_files(run),
        VerdictConfig.model_validate(census["method"]["verdict"]),
        run.config().metric,
        pixels=images != "none",
    )
    path = storage.join(run_dir, "report.html")
    storage.write_atomic(path, render_report(census, exhibits, show=images).encode("utf-8"))
    return path


def judge_file(path: str, rule: VerdictConfig, metric: MetricConfig, first_samples: int | None = None) -> Judgement:
    """Judge a census file, a few thousand rows at a time, without reading candidates or evidence."""
    columns = [name for name in CENSUS_COLUMNS if name != "generations"] + leaves(path, "generations.", _PIXELS)
    filesystem, inner = storage.arrow_filesystem(path)
    with filesystem.open_input_file(inner) as source:
        batches = pq.ParquetFile(source).iter_batches(_BATCH_ROWS, columns=columns)
        tables = (pa.Table.from_batches([batch]) for batch in batches)
        return _join(judge(table, rule, metric, first_samples=first_samples) for table in tables)


def _judge_files(
    files: Sequence[str],
    rule: VerdictConfig,
    metric: MetricConfig,
    run_dir: str,
    on_ray: bool,
    first_samples: int | None = None,
) -> tuple[Tally, pa.Table]:
    work = bind(judge_file, rule=rule, metric=metric, first_samples=first_samples)
    joined = _join(_on_cluster(files, work, run_dir) if on_ray else map(work, files))
    return joined.tally, join_flagged([joined.flagged])


def _on_cluster(files: Sequence[str], work: bind[Judgement], run_dir: str) -> Iterator[Judgement]:
    """One row a file in, one pickled judgement a file out: what reaches the driver is counts and flagged rows."""
    with ray_session(logs_folder(run_dir)):
        import ray.data

        names = ray.data.from_items([{"path": file} for file in files])
        for row in names.map(lambda item: {"judgement": pickle.dumps(work(item["path"]))}).iter_rows():
            yield pickle.loads(row["judgement"])


def _join(judgements: Iterable[Judgement]) -> Judgement:
    tally, tables = Tally(), []
    for judgement in judgements:
        tally += judgement.tally
        tables.append(judgement.flagged)
    return Judgement(tally, join_flagged(tables))


def _on_ray(run: Run, use_ray: bool | None) -> bool:
    return use_ray if use_ray is not None else int((run.manifest["prompts"] or {}).get("distinct", 0)) >= _RAY_FROM


def _census_files(run: Run, partial: bool) -> list[str]:
    """Files of the run's rows: those that commit records name, and in a partial run those of unfinished parts."""
    if run.state != "complete" and not partial:
        raise RunError(
            f"the run is not complete (state: {run.state})",
            where=run.folder.path,
            hint="resume the scan with the same command, or give --partial for figures of what is there",
        )
    files: list[str] = []
    for number in run.parts:
        folder, record = run.folder.census_part(number), run.folder.commit_record(number)
        if storage.exists(record):
            files += [storage.join(folder, name) for name in storage.read_json(record)["files"]]
        elif partial:
            files += _unfinished(folder)
    return files


def _unfinished(folder: str) -> list[str]:
    """Readable files of an uncommitted part. A file that repeats rows of an earlier one is what a resume would drop."""
    seen: set[str] = set()
    files = []
    for file in storage.list_files(folder, (".parquet",)) if storage.is_dir(folder) else []:
        ids = ids_or_none(file)
        if ids and seen.isdisjoint(ids):
            files.append(file)
            seen |= ids
    return files


def _check_conserved(run: Run, tally: Tally) -> None:
    """The rows that were judged are the rows that the scan committed, or no rate is published."""
    counts = run.manifest["counts"]
    found = {
        "inputs": tally.rows,
        "rows": tally.prompts,
        "done": tally.done,
        "rejected": tally.rejected.total(),
        "generations": tally.generations,
    }
    wrong = [name for name, value in found.items() if counts[name] != value]
    if wrong:
        listed = ", ".join(f"{name}: {counts[name]} committed, {found[name]} found" for name in wrong)
        raise RunError(f"rows do not add up ({listed})", where=run.folder.path, hint="restore the census files")


def _reference_files(run: Run) -> list[str]:
    """The images of the index that judged this run: where the scan had it, or in the run folder if that moved.

    Empty where neither is that very index: another one's images must not be shown as evidence.
    """
    index = run.manifest["index"]
    for folder in (index["path"], run.folder.index) if index else ():
        try:
            manifest = Manifest.load(folder, index["version"])
        except IndexLoadError:
            continue
        if manifest.hash == index["hash"]:
            return manifest.reference_files(folder)
    return []


def _add_urls(run: Run, flagged: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    files = _reference_files(run)
    wanted = {match for matches in flagged["match_ids"].to_pylist() for match in matches}
    known = find_matches(files, wanted)
    summary = {
        "path": run.manifest["index"]["path"] if files else None,
        "matched": len(wanted),
        "missing": len(wanted) - len(known),
    }
    return with_urls(flagged, {match: reference.url for match, reference in known.items()}), summary


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
            "config": manifest["config"],
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
            },
            "verdict": {"min_share": rule.min_share, "harm": harm_of(rule)},
            "interval": f"Wilson score, {CONFIDENCE:.0%}"
            if config.screen is None
            else f"from the audit of the screen, {CONFIDENCE:.0%}",
        },
    }
