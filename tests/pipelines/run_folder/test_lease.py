"""One driver a run: rivals, the dead, the slow, on a disk and on S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memscan.errors import RunError
from memscan.io import storage
from pipelines.run_folder import lease as leases
from pipelines.run_folder.lease import hold, take

pytestmark = pytest.mark.waits


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "run" / "lease")
    else:
        yield request.getfixturevalue("s3_bucket") + "/run/lease"


def age(folder: str, number: int, seconds: float, **changes: object) -> None:
    """Make a lease look as if its holder had last been heard of so long ago."""
    path = f"{folder}/{number:06d}.json"
    facts = {**storage.read_json(path), "renewed": time.time() - seconds, "host": "elsewhere", **changes}
    storage.write_atomic(path, json.dumps(facts).encode())


@pytest.fixture(autouse=True)
def observer(monkeypatch: pytest.MonkeyPatch) -> Observer:
    """The observer's clock: it moves when he sleeps, and something may happen meanwhile."""
    made = Observer()
    monkeypatch.setattr(leases, "clock", lambda: made.now)
    monkeypatch.setattr(leases, "sleep", made.sleep)
    return made


class Observer:
    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.mark.parametrize("hours", [-10.0, -100 / 3600, 100 / 3600, 10.0], ids=str)
def test_the_clock_of_a_living_holder_does_not_matter(folder: str, observer: Observer, hours: float) -> None:
    """Ten hours behind or ahead: as long as it is heard of, it is not replaced; and no longer than that."""
    holder = take(folder)
    age(folder, 1, -3600 * hours)

    def renewed() -> None:
        holder._beats += 1
        age(folder, 1, -3600 * hours, beats=holder._beats)

    observer.meanwhile = renewed
    with pytest.raises(RunError, match="is being worked on by process"):
        take(folder)
    assert observer.now < leases.STALE_SECONDS
    observer.meanwhile = lambda: None
    began = observer.now
    assert take(folder).epoch == 2
    assert leases.STALE_SECONDS <= observer.now - began < leases.STALE_SECONDS + 2 * leases.LOOK_SECONDS


def test_an_observer_that_was_stalled_itself_looks_again_before_it_takes_over(folder: str, observer: Observer) -> None:
    take(folder)
    age(folder, 1, 1000)

    def stalled() -> None:
        observer.now += 10 * leases.STALE_SECONDS
        age(folder, 1, 1000, beats=7)

    observer.meanwhile = stalled
    with pytest.raises(RunError, match="is being worked on"):
        take(folder)


def test_an_epoch_is_never_used_twice(folder: str) -> None:
    with hold(folder, above=4) as lease:
        assert lease.epoch == 5
    storage.remove_tree(folder)
    assert take(folder, above=5).epoch == 6


def test_the_second_driver_is_refused_until_the_first_is_done(folder: str) -> None:
    with hold(folder) as first:
        first.check()
        with pytest.raises(RunError, match=f"is being worked on by process {os.getpid()}"):
            take(folder)
    with hold(folder):
        pass


def test_a_stale_lease_is_taken_over_and_its_holder_notices(folder: str) -> None:
    slow = take(folder)
    age(folder, 1, leases.FRESH_SECONDS / 2)
    with pytest.raises(RunError, match="elsewhere"):
        take(folder)
    age(folder, 1, leases.STALE_SECONDS * 2)
    said: list[str] = []
    successor = take(folder, said.append)
    assert "on elsewhere held this run and did not renew its lease lately" in said[0]
    assert (slow.epoch, successor.epoch) == (1, 2)
    for action in (slow.check, slow.renew):
        with pytest.raises(RunError, match="taken this run over"):
            action()
    slow.release()  # of nothing: the successor keeps it
    successor.check()


def test_of_many_rivals_one_wins(folder: str) -> None:
    take(folder)
    age(folder, 1, leases.STALE_SECONDS * 2)
    barrier, outcomes = threading.Barrier(6), []

    def rival() -> None:
        barrier.wait()
        try:
            outcomes.append(take(folder))
        except RunError:
            outcomes.append(None)

    threads = [threading.Thread(target=rival) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome is not None for outcome in outcomes) == 1


def test_a_holder_that_died_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "lease")
    code = f"from pipelines.run_folder.lease import take; take({folder!r})"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    take(folder).check()


def test_the_keeper_renews(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    with hold(folder):
        before = storage.read_json(f"{folder}/000001.json")["renewed"]
        deadline = time.monotonic() + 10
        while storage.read_json(f"{folder}/000001.json")["renewed"] == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert storage.read_json(f"{folder}/000001.json")["renewed"] > before
