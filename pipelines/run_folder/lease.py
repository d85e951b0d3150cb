"""One driver a run: a lease in the run's folder, renewed while its holder lives and taken over when it is not.

A lease is a file with a number, `lease/000007.json`. The highest number counts. Taking the lease is creating the next
number, which exactly one of several rivals can do, on a disk as on S3 (a conditional put). A holder renews its own
file, and one that finds a higher number has lost the lease and must not write on. So no clock decides who holds it:
clocks only say when a lease is old enough to be taken over, and a holder that was merely slow notices.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from memscan.errors import MemscanError, RunError
from memscan.io import storage

RENEW_SECONDS = 10.0
# Three times the longest stall that was seen of S3 or of a machine under load; a takeover is worth the wait.
STALE_SECONDS = 90.0


class Lease:
    """The right to write into a run. Made by `hold`."""

    def __init__(self, folder: str, number: int) -> None:
        self._folder, self._number, self._lost = folder, number, False

    def check(self) -> None:
        """Raise RunError if another driver has taken the lease over."""
        if self._lost or _latest(self._folder) != self._number:
            self._lost = True
            raise RunError(
                "another driver has taken this run over, because this one had not been heard of for "
                f"{STALE_SECONDS:.0f} seconds",
                where=self._folder,
                hint="let the other one finish",
            )

    def renew(self) -> None:
        """Say that the holder lives. Raises RunError as `check`."""
        self.check()
        storage.write_atomic(_file(self._folder, self._number), _content(released=False))

    def release(self) -> None:
        """Give the lease back, so that the next driver need not wait."""
        if not self._lost and _latest(self._folder) == self._number:
            storage.write_atomic(_file(self._folder, self._number), _content(released=True))


@contextmanager
def hold(folder: str) -> Iterator[Lease]:
    """Hold the lease of a run for the length of a `with` block.

    Args:
        folder: of the lease files, local or s3://.

    Raises:
        RunError: a driver that is alive holds it (names its host and process).
    """
    lease = take(folder)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(lease, stop), name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    except BaseException:
        with suppress(MemscanError):  # a disk too full for that: the lease goes stale, and the reason is told
            _end(lease, stop, keeper)
        raise
    _end(lease, stop, keeper)


def _end(lease: Lease, stop: threading.Event, keeper: threading.Thread) -> None:
    stop.set()
    keeper.join(timeout=RENEW_SECONDS)
    lease.release()


def take(folder: str) -> Lease:
    """Create the next number. Raises RunError as `hold`."""
    number = _latest(folder)
    if number:
        _refuse_living(folder)
    if not storage.create_new(_file(folder, number + 1), _content(released=False)):
        _refuse_living(folder)
        raise RunError("another driver has just taken this run", where=folder, hint="give the command again")
    # Released and stale numbers are of no use to anybody but the reader of the folder.
    for old in range(max(1, number - 20), number):
        storage.remove_tree(_file(folder, old))
    return Lease(folder, number + 1)


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, the lease of a run.

    Args:
        age: seconds since it was last renewed.
        working: whether it counts as alive: neither given back, nor stale, nor a process of this machine that is gone.
    """

    host: str
    pid: int
    age: float
    released: bool
    working: bool


def holder(folder: str) -> Holder | None:
    """The last holder of a lease; None where there has been none."""
    number = _latest(folder)
    if not number:
        return None
    facts = _read(folder, number)
    age, released = max(0.0, time.time() - float(facts.get("renewed", 0.0))), bool(facts.get("released"))
    working = not released and age < STALE_SECONDS and not _died_here(facts)
    return Holder(str(facts.get("host", "")), int(facts.get("pid", 0)), age, released, working)


def _refuse_living(folder: str) -> None:
    found = holder(folder)
    if found is not None and found.working:
        raise RunError(
            f"is being worked on by process {found.pid} on {found.host} ({found.age:.0f} s ago)",
            where=folder.rsplit("/", 1)[0],
            hint=f"stop it first; a driver that has died is replaced after {STALE_SECONDS:.0f} seconds",
        )


def _died_here(facts: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone: then nobody need wait."""
    if facts.get("host") != socket.gethostname() or facts.get("boot") != _boot():
        return False
    return not os.path.exists(f"/proc/{facts.get('pid')}") if os.path.isdir("/proc/self") else False


def _keep(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        try:
            lease.renew()
        except RunError:
            return  # lost: the driver notices at its next commit
        except MemscanError:
            continue  # storage is away for a moment; the lease lives until it is stale


def _latest(folder: str) -> int:
    if not storage.is_dir(folder):
        return 0
    numbers = [file.rsplit("/", 1)[-1].removesuffix(".json") for file in storage.list_files(folder, ".json")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _file(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _read(folder: str, number: int) -> dict[str, Any]:
    found = storage.read_json(_file(folder, number))
    return found if isinstance(found, dict) else {}


def _content(*, released: bool) -> bytes:
    facts = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "renewed": time.time(),
        "released": released,
    }
    return json.dumps(facts).encode()


def _boot() -> str:
    """Names one start of a machine, or of a container: process numbers mean something within it only."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            namespace = os.readlink("/proc/self/ns/pid")
            return file.read().strip() + namespace
    except OSError:
        return ""
