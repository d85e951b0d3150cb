"""Rows that kill or hang their worker, in processes that really die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from memscan.errors import Reason, RowReject
from pipelines.run_folder.journal import EXIT_CODE, Journal

SECONDS = 1.5


def work_on(rows: list[str], places: Sequence[int]) -> list[str]:
    for place in places:
        if rows[place].startswith("kill"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if rows[place].startswith("hang"):
            time.sleep(600)
    return [rows[place].upper() for place in places]


def _attempt(folder: str, rows: list[str], queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    results = Journal(folder, SECONDS).run("census", rows, lambda places: work_on(rows, places))
    queue.put([result.reason.value if isinstance(result, RowReject) else result for result in results])


def workers(folder: str, rows: list[str], most: int = 8) -> tuple[list[str], list[int]]:
    """Give the rows to one worker after another, as Ray does; the results, and how the workers ended."""
    context = multiprocessing.get_context("spawn")
    ends: list[int] = []
    for _ in range(most):
        queue = context.Queue()
        worker = context.Process(target=_attempt, args=(folder, rows, queue))
        worker.start()
        worker.join(timeout=60)
        assert worker.exitcode is not None
        ends.append(worker.exitcode)
        if worker.exitcode == 0:
            return queue.get(timeout=10), ends
    raise AssertionError(f"never through: {ends}")


@pytest.mark.slow
def test_deadly_rows_are_named_and_their_neighbours_done(tmp_path: Path) -> None:
    rows = ["a", "kill 1", "b", "hang 1", "c"]
    results, ends = workers(str(tmp_path), rows)
    assert results == ["A", "worker_died", "B", "row_timed_out", "C"]
    # The block together, then each deadly row once more on its own.
    assert ends == [-signal.SIGSEGV, -signal.SIGSEGV, EXIT_CODE, 0]


def test_harmless_rows_leave_no_record(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal"), 60)
    assert journal.run("census", ["a", "b"], lambda places: list(places)) == [0, 1]
    assert not list((tmp_path / "journal").rglob("*.json"))


def test_an_error_of_the_job_is_no_death(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), 60)
    with pytest.raises(ZeroDivisionError):
        journal.run("census", ["a"], lambda places: [1 // 0])
    assert not list(tmp_path.rglob("*.json"))


def test_without_a_folder_nothing_is_watched() -> None:
    assert Journal("", 1e-9).run("census", ["a"], lambda places: ["done"]) == ["done"]


def test_codes_are_stable() -> None:
    assert (Reason.ROW_TIMED_OUT, Reason.WORKER_DIED) == ("row_timed_out", "worker_died")
