"""This module makes the report of a reduced run from its figures and the evidence of the prompts that it shows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from memscan.census import flagged as flagged_files
from memscan.config import VerdictConfig
from memscan.errors import RunError
from memscan.io import storage
from memscan.report import Images, choose_exhibits, gather_exhibits, render_report
from pipelines.reduce.outputs import CENSUS_FILE, settle
from pipelines.run_folder.results import reference_files
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table

FORMAT = "memscan-census/1"


def report_run(run_dir: str, *, images: Images = "show") -> str:
    """Write a reduced run's report.html again, and return its path.

    Raises:
        RunError: the run has not been reduced, or by another version.
    """
    run = Run.load(run_dir)
    return write_report(run, read_census(run), run_dir, images)


def write_report(run: Run, census: dict[str, Any], folder: str, images: Images) -> str:
    """Write report.html beside the lists of a reduce, and return its path.

    Args:
        census: the content of census.json.
        folder: of the lists: the run's, or where a reduce has written them first.
    """
    flagged = flagged_files.read_parquet(storage.join(folder, "flagged", flagged_files.NAMES[0]))
    clusters = read_table(storage.join(folder, "clusters", "clusters.parquet")).to_pylist()
    removal = read_table(storage.join(folder, "flagged", "removal.parquet"))
    chosen = pa.array(choose_exhibits(flagged), pa.int64())
    exhibits = gather_exhibits(
        flagged.take(chosen).to_pylist(),
        run.folder.path,
        reference_files(run),
        VerdictConfig.model_validate(census["method"]["verdict"]),
        run.config().metric,
        pixels=images != "none",
    )
    page = render_report(census, flagged, clusters, removal, exhibits, run.config().metric, show=images)
    path = storage.join(folder, "report.html")
    storage.write_atomic(path, page.encode("utf-8"))
    return path


def read_census(run: Run) -> dict[str, Any]:
    """Return a reduced run's figures, after a check that the files beside them are their lists.

    Raises:
        RunError: the run has not been reduced, or by another version, or its figures are those of another run, or a
            file beside them is of another reduce, or damaged.
    """
    where = run.folder.path
    settle(where)
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
            what = "is not the file that census.json was written with: it is damaged, or belongs to another reduce"
            raise RunError(what, where=file, hint="run memscan reduce again")
    return dict(census)
