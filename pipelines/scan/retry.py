"""This module tries rejected rows of a run again, for example after a lost machine or a repaired model.

Rows that were rejected when their file was read stay rejected. Rows that a stage rejected are taken out of their part,
which is then no longer committed, and the scan does the missing rows. No committed file is changed: the remaining rows
of a file are written beside it, and one switch of the run's state opens all the parts at once. A kill before the switch
leaves the run as it was. After a kill later on, a scan completes the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from memscan.config import CensusConfig
from memscan.errors import ConfigError, Reason, RunError
from memscan.io import storage
from memscan.records import Status
from pipelines.run_folder.identity import CODE, code_version, refuse_other_code
from pipelines.run_folder.lease import hold
from pipelines.run_folder.parts import write_census
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts, read_table
from pipelines.scan.job import scan

# Of rows that no second attempt could change.
OF_THE_INPUT = (Reason.CAPTION_EMPTY, Reason.CAPTION_TOO_LONG, Reason.CAPTION_NOT_UTF8, Reason.ROW_MALFORMED)


@dataclass(frozen=True)
class Retried:
    """This is the outcome of a retry: rows tried again, the run's counts after it, and its configuration."""

    rows: int
    counts: Counts
    config: CensusConfig


def retry(path: str, reasons: Collection[str] = (), say: Callable[[str], None] = lambda text: None) -> Retried:
    """Try the rejected rows of a complete run again.

    Args:
        reasons: only rows with these codes; by default all that a stage gave.
        say: as for `scan`.

    Raises:
        ConfigError: an unknown reason, or one of the input.
        RunError: no run, one that is being worked on, or one that is not complete.
    """
    wanted = _wanted(reasons)
    run = Run.load(path)
    _complete(run)
    refuse_other_code(path, run.manifest["identity"], {CODE: code_version()})  # before rows are taken out for it
    rows = reopen_rejected(path, wanted, say)
    config = Run.load(path).config()
    return Retried(rows, scan(config, say) if rows else Run.load(path).progress(), config)


def reopen_rejected(path: str, reasons: Collection[str], say: Callable[[str], None] = lambda text: None) -> int:
    """Open the parts with rows of these reasons again, without them; gives how many they are. Raises as `retry`."""
    run = Run.load(path)
    with hold(run.folder.leases, say, run.epoch) as lease:
        run = Run.load(path)  # again: another driver may have worked on it until now
        run.lease = lease
        _complete(run)
        taken_out = {number: found for number in run.parts if (found := _without(run, number, list(reasons)))}
        if taken_out:
            lease.check()
            run.reopen({number: names for number, (names, _) in taken_out.items()})
    return sum(rows for _, rows in taken_out.values())


def _complete(run: Run) -> None:
    if run.state != "complete":
        raise RunError(
            f"the run is not complete (state: {run.state})", where=run.folder.path, hint="memscan scan resumes it"
        )


def _wanted(reasons: Collection[str]) -> list[str]:
    known = [reason.value for reason in Reason if reason not in OF_THE_INPUT]
    unknown = [reason for reason in reasons if reason not in known]
    if unknown:
        raise ConfigError(f"no row can be tried again for {unknown[0]!r}", where="--reason", hint=", ".join(known))
    return list(reasons) or known


def _without(run: Run, number: int, reasons: list[str]) -> tuple[list[str], int] | None:
    """Names of a part's files without its rejected rows, and how many these are; None if there are none."""
    counts = run.committed(number)
    if counts is None or not set(counts.reasons or {}) & set(reasons):
        return None
    folder, names, removed = run.folder.census_part(number), [], 0
    for name in run.committed_files(number):
        rows = read_table(storage.join(folder, name))
        again = pc.and_(
            pc.equal(rows["status"], Status.REJECTED.value),
            pc.fill_null(pc.is_in(rows["reason"], pa.array(reasons)), False),
        )
        kept = rows.filter(pc.invert(again))
        if kept.num_rows == rows.num_rows:
            names.append(name)
            continue
        removed += rows.num_rows - kept.num_rows
        if kept.num_rows:
            names.append(write_census(folder, kept, run.epoch, run.fingerprint))
    return names, removed
