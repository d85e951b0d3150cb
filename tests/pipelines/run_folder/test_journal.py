"""Rows that kill or hang their worker, in processes that really die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memscan.errors import Reason, RowReject
from pipelines.run_folder.journal import EXIT_CODE, TOGETHER_DEATHS, Journal, _digest

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


IDS = ["a", "b", "c", "d"]


def company(places: Sequence[int]) -> list[str]:
    """A result that depends on which rows are at work together, as rounding does."""
    return ["".join(IDS[at] for at in places)] * len(places)


def died(folder: Path, name: str, times: int = 1) -> None:
    """What workers leave that die at a record of this name."""
    for at in range(times):
        file = folder / name / f"{at}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"pid": 1, "timed_out": false}')


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deadly=st.sets(st.sampled_from(IDS)),
    killed=st.integers(0, 1),
    again=st.integers(0, TOGETHER_DEATHS - 1),
)
def test_a_worker_that_is_killed_from_outside_changes_no_bit(
    tmp_path_factory: pytest.TempPathFactory, deadly: set[str], killed: int, again: int
) -> None:
    """The results of rows that live are those of the same rows together, whoever was killed meanwhile, and when."""

    def outcome(outside: int, later: int) -> list[str]:
        folder = tmp_path_factory.mktemp("journal")
        block = f"describe-block-{_digest(IDS)}"
        if deadly or outside:
            died(folder, block, outside + bool(deadly))
        for row in deadly:
            died(folder, f"describe-row-{_digest([row])}")
        if later and (deadly or outside):
            died(folder, f"{block}-together", later)
        found = Journal(str(folder), 60).run("describe", IDS, company, exact=True)
        return [one.reason.value if isinstance(one, RowReject) else one for one in found]

    together = "".join(name for name in IDS if name not in deadly)
    assert outcome(killed, again) == outcome(0, 0)
    assert outcome(killed, again) == ["worker_died" if name in deadly else together for name in IDS]


def test_rows_that_live_alone_and_die_together_are_done_alone(tmp_path: Path) -> None:
    block = f"describe-block-{_digest(IDS)}"
    died(tmp_path, block)
    died(tmp_path, f"{block}-together", TOGETHER_DEATHS)
    assert Journal(str(tmp_path), 60).run("describe", IDS, company, exact=True) == IDS
