"""Rejected rows of a run, tried again: after a lost machine, a watchdog set too tight, a mended model.

Rows that were rejected when their file was read are what they are; rows that a stage rejected are taken out of their
part, which is then no longer committed, and the scan does what is missing. Each step can be killed and repeated: the
commit record goes first, and a file of the part is replaced by itself without the rows, in one move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import ConfigError, Reason, RunError
from memscan.io import storage
from memscan.records import Status
from pipelines.run_folder.lease import hold
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts, read_table, write_table
from pipelines.scan.job import scan

# Of rows that no second attempt could change.
OF_THE_INPUT = (Reason.CAPTION_EMPTY, Reason.CAPTION_TOO_LONG, Reason.CAPTION_NOT_UTF8, Reason.ROW_MALFORMED)


@dataclass(frozen=True)
class Retried:
    """Outcome of a retry: rows tried again, and the run's counts after it."""

    rows: int
    counts: Counts


def retry(path: str, reasons: Collection[str] = (), say: Callable[[str], None] = lambda text: None) -> Retried:
    """Try the rejected rows of a complete run again.

    Args:
        reasons: only rows with these codes; default all that a stage gave.
        say: as for `scan`.

    Raises:
        ConfigError: an unknown reason, or one of the input.
        RunError: no run, one that is being worked on, or one that is not complete.
    """
    wanted = _wanted(reasons)
    run = Run.load(path)
    if run.state != "complete":
        raise RunError(f"the run is not complete (state: {run.state})", where=path, hint="memscan scan resumes it")
    with hold(run.folder.leases) as lease:
        run = Run.load(path)
        run.lease = lease
        rows = sum(_reopen_part(run, number, wanted) for number in run.parts)
        if rows:
            run.reopen()
    return Retried(rows, scan(run.config(), say) if rows else run.progress())


def _wanted(reasons: Collection[str]) -> list[str]:
    known = [reason.value for reason in Reason if reason not in OF_THE_INPUT]
    unknown = [reason for reason in reasons if reason not in known]
    if unknown:
        raise ConfigError(f"no row can be tried again for {unknown[0]!r}", where="--reason", hint=", ".join(known))
    return list(reasons) or known


def _reopen_part(run: Run, number: int, reasons: list[str]) -> int:
    """Take the rejected rows out of a part's files; how many they were."""
    counts = run.committed(number)
    if counts is not None and not set(counts.reasons or {}) & set(reasons):
        return 0
    if counts is not None:
        run.uncommit(number)
    removed = 0
    for file in run.files(number):
        rows = read_table(file)
        again = pc.and_(
            pc.equal(rows["status"], Status.REJECTED.value),
            pc.fill_null(pc.is_in(rows["reason"], pa.array(reasons)), False),
        )
        kept = rows.filter(pc.invert(again))
        if kept.num_rows == rows.num_rows:
            continue
        removed += rows.num_rows - kept.num_rows
        if kept.num_rows:
            write_table(file, kept)
        else:
            storage.remove_tree(file)
    return removed
