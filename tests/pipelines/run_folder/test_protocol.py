"""The protocol of lease, commit and state, tried in all orders: two drivers, a stall of the first at any of its steps.

The real functions on a real folder; a driver is what `scan` is without Ray, and its steps are what it asks of storage.
Every lease counts as stale at once, which is worse than any clock can be. The first driver stops at its step k, for as
long as the second one takes for j steps or for all, and goes on, or never does. Whatever came before, a third driver
then ends the run: no row lost, none doubled, nothing left over, no dead end.

The suite takes a few orders of each kind, drawn by MEMSCAN_TEST_SEED; all of them, some 10 minutes on two cores, by

    MEMSCAN_EXHAUSTIVE=1 pytest tests/pipelines/run_folder/test_protocol.py
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from memscan.config import CensusConfig, parse_config
from memscan.errors import MemscanError
from memscan.io import storage
from memscan.prompts.table import PromptTable
from memscan.records import CENSUS, PROMPTS
from pipelines.run_folder import lease as leases
from pipelines.run_folder.identity import identity
from pipelines.run_folder.parts import names_in, write_census
from pipelines.run_folder.results import part_files
from pipelines.run_folder.runs import Run
from pipelines.scan.repair import mend
from pipelines.scan.retry import reopen_rejected

PROMPT_COUNT, PART_SIZE = 4, 2
STEPS = ("create_new", "write_atomic", "remove_tree", "list_files", "read_bytes")


def settings(out: Path) -> CensusConfig:
    model = {"path": "m"}
    data = {"name": "n", "out": str(out), "prompts": {"paths": ["p.txt"]}, "index": {"source": "images"}}
    return parse_config({**data, "generator": model, "segmenter": model, "embedder": model})


def prompts() -> PromptTable:
    rows = [
        {"prompt_id": f"{at:016x}", "caption": f"c{at}", "count": 1, "source": "p.txt", "row": at, "status": "done"}
        for at in range(PROMPT_COUNT)
    ]
    return PromptTable(pa.Table.from_pylist(rows, schema=PROMPTS), PROMPT_COUNT, ())


def census(rows: pa.Table, **changes: Any) -> pa.Table:
    return pa.Table.from_pylist([{**row, "generations": [], **changes} for row in rows.to_pylist()], schema=CENSUS)


def scan(out: Path) -> None:
    """What `pipelines.scan.job.scan` does, with rows for models."""
    config = settings(out)
    content = identity(config, {})
    run = Run.prepare(config, content)
    if run.state == "complete":
        return
    lease = leases.take(run.folder.leases, above=run.epoch)
    run = Run.open(config, content, lease)
    if not run.manifest["prompts"]:
        run.write_prompts(prompts(), PART_SIZE)
    for number in run.parts:
        if run.committed(number) is not None:
            continue
        left = run.todo(number)
        for at in range(left.num_rows):
            # `made` tells the epochs apart: a row that is done again has other bytes.
            rows = census(left.slice(at, 1), message=f"made in {lease.epoch}")
            write_census(run.folder.census_part(number), rows, lease.epoch, run.fingerprint)
        run.commit(number)
    run.finish()
    lease.release()


def retry(out: Path) -> None:
    reopen_rejected(str(out), ["worker_died"])
    scan(out)


def repair(out: Path) -> None:
    mend(str(out))
    scan(out)


class Interleaving:
    """Threads that stop at a step of their own, counted in calls of storage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stops: dict[str, int]) -> None:
        self.counts = dict.fromkeys(stops, 0)
        self.stops = stops
        self.stopped = {name: threading.Event() for name in stops}
        self.going = {name: threading.Event() for name in stops}
        self.errors: dict[str, BaseException] = {}
        for step in STEPS:
            monkeypatch.setattr(storage, step, self._counted(getattr(storage, step)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            name = threading.current_thread().name
            if name in self.counts:
                if self.counts[name] == self.stops[name]:
                    self.stopped[name].set()
                    self.going[name].wait()
                self.counts[name] += 1
            return real(*args, **kwargs)

        return call

    def start(self, name: str, work: Callable[[Path], None], out: Path) -> threading.Thread:
        def run() -> None:
            try:
                work(out)
            except BaseException as error:
                self.errors[name] = error
            finally:
                self.stopped[name].set()

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self.stopped[name].wait()
        return thread

    def resume(self, name: str, thread: threading.Thread) -> None:
        self.going[name].set()
        thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every holder looks dead at once, and the disk need not be reached."""
    ticks = itertools.count(step=1000)
    monkeypatch.setattr(leases, "clock", lambda: float(next(ticks)))
    monkeypatch.setattr(leases, "sleep", lambda _: None)
    monkeypatch.setattr(leases, "FRESH_SECONDS", -1.0)
    monkeypatch.setattr("os.fsync", lambda _: None)


def check(out: Path, epochs_left: bool = False) -> None:
    """A third driver ends the run; every prompt is there once, and nothing else."""
    scan(out)
    run = Run.load(str(out))
    assert run.state == "complete"
    assert run.manifest["counts"]["rows"] == PROMPT_COUNT
    ids = [name for number in run.parts for name in part_files(run, number, ["prompt_id"]).ids]
    assert sorted(ids) == sorted(prompts().table["prompt_id"].to_pylist())
    for number in run.parts:
        left = set(names_in(run.folder.census_part(number))) - set(run.committed_files(number))
        assert not left or epochs_left


def attempt(
    folder: Path, first: Callable[[Path], None], second: Callable[[Path], None], k: int, j: int, wakes: bool
) -> bool:
    """One order of steps; whether the first driver was stopped at all."""
    with pytest.MonkeyPatch.context() as patched:
        order = Interleaving(patched, {"first": k, "second": j})
        one = order.start("first", first, folder)
        stalled = one.is_alive()
        other = order.start("second", second, folder)
        if wakes:
            order.resume("first", one)
        order.resume("second", other)
        if not wakes:
            order.stops["first"] = -1
    for error in order.errors.values():
        if not isinstance(error, MemscanError):  # a driver may be told in one line that it lost, and nothing else
            raise error
    check(folder, epochs_left=True)
    if not wakes and stalled:  # the thread ends with the test; what it would do now is another order's subject
        order.errors.clear()
    return stalled


def orders(first: Callable[[Path], None], folder: Path) -> int:
    """How many steps a driver takes alone."""
    with pytest.MonkeyPatch.context() as patched:
        order = Interleaving(patched, {"first": 10**9})
        order.start("first", first, folder).join()
        assert not order.errors
        return order.counts["first"]


def begun(folder: Path, complete: bool) -> Path:
    """No run yet, or a complete one with a row that killed its worker."""
    if not complete:
        return folder
    config = settings(folder)
    run = Run.open(config, identity(config, {}), leases.take(str(folder / "lease")))
    run.write_prompts(prompts(), PART_SIZE)
    for number in run.parts:
        rows = run.todo(number)
        died = {"status": "rejected", "reason": "worker_died", "message": "gone"}
        for at, changes in enumerate(({}, died)):
            table = census(rows.slice(at, 1), **changes)
            write_census(run.folder.census_part(number), table, run.epoch, run.fingerprint)
        run.commit(number)
    run.finish()
    return folder


DRAWN = {True: 4, False: 2}  # orders of steps in the suite, by whether the first driver comes back
PAIRS = [(scan, scan, False), (retry, scan, True), (retry, retry, True), (repair, retry, True)]


@pytest.mark.parametrize(("first", "second", "complete"), PAIRS, ids=lambda one: getattr(one, "__name__", None))
@pytest.mark.parametrize("wakes", [True, False], ids=["wakes", "dies"])
def test_no_order_of_steps_loses_or_doubles_a_row(
    tmp_path: Path, impatient: None, first: Any, second: Any, complete: bool, wakes: bool, rng: np.random.Generator
) -> None:
    begin = begun(tmp_path / "begin", complete)
    alone = tmp_path / "alone"
    if complete:
        shutil.copytree(begin, alone)
    steps = orders(first, alone)
    assert steps > 20
    # The second driver whole, and stopped after some of its steps while the first goes on: another share each time.
    tried = [(k, j) for k in range(steps) for j in ((10**9, (7 * k + 3) % steps) if wakes else (10**9,))]
    if "MEMSCAN_EXHAUSTIVE" not in os.environ:
        tried = [tried[at] for at in sorted(rng.choice(len(tried), DRAWN[wakes], replace=False))]
    for k, j in tried:
        folder = tmp_path / f"{k}-{j}"
        if complete:
            shutil.copytree(begin, folder)
        assert attempt(folder, first, second, k, j, wakes), (k, j)
        shutil.rmtree(folder, ignore_errors=True)
