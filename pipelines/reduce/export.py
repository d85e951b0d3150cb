"""This module writes the evidence of a reduced run as files, for people without memscan (`memscan.report.export`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memscan.census import flagged as flagged_files
from memscan.config import VerdictConfig
from memscan.errors import ConfigError
from memscan.io import storage
from memscan.records import MEMORISED
from memscan.report.evidence import Exhibit, gather_exhibits
from memscan.report.export import export_pairs
from pipelines.reduce.report import read_census
from pipelines.run_folder.places import local_folder
from pipelines.run_folder.results import reference_files
from pipelines.run_folder.runs import Run

# Prompts whose pictures are in memory at a time.
_AT_ONCE = 32


def export_run(run_dir: str, out: str, labels: Sequence[str] = (), limit: int | None = None) -> dict[str, Any]:
    """Write the pictures of a reduced run's flagged prompts; returns the manifest (`export_pairs`).

    Args:
        out: a new folder on this machine.
        labels: only prompts of these classes; all of them by default.
        limit: only this number of prompts, the most severe ones.

    Raises:
        ConfigError: a name that is not a label.
        RunError: the run has not been reduced.
        MemscanError: the folder holds something.
    """
    if unknown := sorted(set(labels) - set(MEMORISED)):
        raise ConfigError(f"no class {unknown[0]!r}", where="--label", hint=", ".join(MEMORISED))
    folder, run = local_folder(out), Run.load(run_dir)
    census = read_census(run)
    flagged = flagged_files.read_parquet(storage.join(run.folder.path, "flagged", flagged_files.NAMES[0]))
    if labels:
        flagged = flagged.filter(pc.is_in(flagged["label"], pa.array(list(labels))))
    chosen = flagged.slice(0, limit) if limit else flagged
    about = {
        "run": {key: census["run"][key] for key in ("name", "fingerprint", "ended")},
        "models": census["models"],
        "method": {key: census["method"][key] for key in ("metric", "canvas", "thresholds")},
        "partial": census["partial"],
    }
    reviewed = {one["prompt_id"]: one["verdict"] for one in (census.get("review") or {}).get("verdicts", ())}
    return export_pairs(folder, _exhibits(run, census, chosen), about, reviewed)


def _exhibits(run: Run, census: dict[str, Any], flagged: pa.Table) -> Iterator[Exhibit]:
    rule, files = VerdictConfig.model_validate(census["method"]["verdict"]), reference_files(run)
    for start in range(0, flagged.num_rows, _AT_ONCE):
        rows = flagged.slice(start, _AT_ONCE).to_pylist()
        yield from gather_exhibits(rows, run.folder.path, files, rule, run.config().metric)
