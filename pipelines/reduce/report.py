"""This module makes the report of a reduced run from its figures and the evidence of the prompts that it shows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from memscan.census import flagged as flagged_files
from memscan.config import VerdictConfig
from memscan.errors import RunError
from memscan.io import storage
from memscan.report import Images, choose_exhibits, gather_exhibits, render_report
from pipelines.run_folder.results import reference_files
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table

FORMAT = "memscan-census/1"
CENSUS_FILE = "census.json"


def report_run(run_dir: str, *, images: Images = "show") -> str:
    """Write a reduced run's report.html anew, and return its path.

    Raises:
        RunError: the run has not been reduced, or by another version.
    """
    run = Run.load(run_dir)
    census = read_census(run)
    flagged = flagged_files.read_parquet(storage.join(run_dir, "flagged", flagged_files.NAMES[0]))
    clusters = read_table(storage.join(run_dir, "clusters", "clusters.parquet")).to_pylist()
    removal = read_table(storage.join(run_dir, "flagged", "removal.parquet"))
    chosen = pa.array(choose_exhibits(flagged), pa.int64())
    exhibits = gather_exhibits(
        flagged.take(chosen).to_pylist(),
        run_dir,
        reference_files(run),
        VerdictConfig.model_validate(census["method"]["verdict"]),
        run.config().metric,
        pixels=images != "none",
    )
    page = render_report(census, flagged, clusters, removal, exhibits, run.config().metric, show=images)
    path = storage.join(run_dir, "report.html")
    storage.write_atomic(path, page.encode("utf-8"))
    return path


def withdraw(run_dir: str) -> None:
    """Take census.json away before the outputs of a reduce are replaced: until it is there again, there is none."""
    storage.remove_tree(storage.join(run_dir, CENSUS_FILE))


def publish(run_dir: str, document: dict[str, Any]) -> None:
    """Write census.json, which makes the files beside it the outputs of one reduce: it names them with their hashes."""
    names = [
        file.removeprefix(run_dir.rstrip("/") + "/")
        for folder in ("flagged", "clusters")
        for file in storage.list_files(storage.join(run_dir, folder), (".parquet", ".csv", ".jsonl"))
    ]
    document["files"] = {name: storage.sha256_file(storage.join(run_dir, name)) for name in names}
    storage.write_json(storage.join(run_dir, CENSUS_FILE), document)


def read_census(run: Run) -> dict[str, Any]:
    """Return a reduced run's figures, after a check that the files beside them are their lists.

    Raises:
        RunError: the run has not been reduced, or by another version, or its figures are those of another run, or a
            file beside them is of another reduce, or damaged.
    """
    where = run.folder.path
    path = storage.join(where, CENSUS_FILE)
    if not storage.exists(path):
        raise RunError("the run has not been reduced (no census.json)", where=where, hint="run memscan reduce first")
    census = storage.read_json(path)
    if (
        census.get("format") != FORMAT
        or "clusters" not in census
        or census["run"]["fingerprint"] != run.manifest["fingerprint"]
    ):
        raise RunError("census.json is of another run or version", where=where, hint="run memscan reduce again")
    for name, digest in census.get("files", {}).items():  # of runs of older versions nobody knows
        file = storage.join(where, name)
        if not storage.is_inner(name) or not storage.exists(file) or storage.sha256_file(file) != digest:
            what = "is not the file that census.json was written with: damaged, or of another reduce"
            raise RunError(what, where=file, hint="run memscan reduce again")
    return dict(census)
