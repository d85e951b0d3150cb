"""This module lets one driver at a time work on a run.

A lease in the run's folder is renewed while its holder lives, and taken over when it does not.

A lease is a number, `lease/000007.json`, and the highest counts (`memscan/io/register.py`): taking the lease is a
compare-and-swap from the number that was seen to the next one. The number is the holder's **epoch**. All that a driver
and its workers write lies below their epoch, so a driver that was stalled and comes back (a stopped process, a frozen
machine) disturbs nobody: what it writes is not read (`runs.py`).

No decision depends on clock times. Whether a holder lives is *observed*: a lease whose content does not change for
STALE_SECONDS of the observer's own monotonic clock is taken over, whatever time its holder's clock shows. The time in a
lease only allows an earlier refusal: if both clocks say that its holder was alive just now, there is no need to wait.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from memscan.errors import InputError, MemscanError, RunError
from memscan.io import storage
from memscan.io.register import Register

RENEW_SECONDS = 10.0
# Three times the longest stall that was seen of S3 or of a machine under load; a takeover is worth the wait.
STALE_SECONDS = 90.0
FRESH_SECONDS = 3 * RENEW_SECONDS
LOOK_SECONDS = 2.5

# The observer's own clock, in a place of their own so that a test can put others here.
clock: Callable[[], float] = time.monotonic
sleep: Callable[[float], None] = time.sleep


class Lease:
    """This is the right to write into a run. It is made by `hold`."""

    def __init__(self, folder: str, number: int) -> None:
        self._folder, self._number, self._lost, self._beats = folder, number, False, 0

    @property
    def epoch(self) -> int:
        """This number grows with every holder."""
        return self._number

    def check(self) -> None:
        """Raise RunError if another driver has taken the lease over."""
        if self._lost or Register(self._folder).latest() != self._number:
            self._lost = True
            raise taken_over(self._folder)

    def renew(self) -> None:
        """Say that the holder lives. Raises RunError as `check`."""
        self.check()
        self._beats += 1
        self._write(released=False)

    def release(self) -> None:
        """Give the lease back, so that the next driver need not wait."""
        if not self._lost and Register(self._folder).latest() == self._number:
            self._write(released=True)

    def _write(self, *, released: bool) -> None:
        path = Register(self._folder).file(self._number)
        storage.write_atomic(path, _content(released=released, beats=self._beats))


def taken_over(folder: str) -> RunError:
    """Return the error for a driver that does not hold the lease any more."""
    return RunError(
        "another driver has taken this run over, because this one had not been heard of for "
        f"{STALE_SECONDS:.0f} seconds",
        where=folder,
        hint="let the other one finish",
    )


@contextmanager
def hold(folder: str, say: Callable[[str], None] = lambda text: None, above: int = 0) -> Iterator[Lease]:
    """Hold the lease of a run for the length of a `with` block.

    Args:
        folder: of the lease files, local or s3://.
        say: receives a line where a holder that was not heard of for a while is observed first.
        above: an epoch that was used already, should the folder have been lost.

    Raises:
        RunError: a driver that is alive holds it (names its host and process).
    """
    lease = take(folder, say, above)
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


def take(folder: str, say: Callable[[str], None] = lambda text: None, above: int = 0) -> Lease:
    """Create the next number, as soon as the last holder is known not to live. Raises RunError as `hold`."""
    register = Register(folder)
    number = register.latest()
    if number < above:
        storage.create_new(register.file(above), _content(released=True))
        number = above
    elif number:
        _wait_for_death(folder, number, say)
    if not register.swap(number, _content(released=False)):
        _refuse_fresh(folder)
        raise RunError("another driver has just taken over this run", where=folder, hint="give the command again")
    register.keep(2)
    return Lease(folder, number + 1)


@dataclass(frozen=True)
class Holder:
    """This is who holds, or held, the lease of a run.

    Args:
        age: seconds since it was last renewed, by the clocks of both machines.
        working: whether it seems to be alive: neither given back, nor stale, nor a process of this machine that is
            gone. A guess by clocks, to be shown; nobody takes a lease over by it.
    """

    host: str
    pid: int
    age: float
    released: bool
    working: bool


def holder(folder: str) -> Holder | None:
    """Return the last holder of a lease; None if there has been none."""
    number = Register(folder).latest()
    return _holder(_read(folder, number)) if number else None


def _holder(facts: dict[str, Any]) -> Holder:
    apart, released = time.time() - float(facts.get("renewed", 0.0)), bool(facts.get("released"))
    working = not released and abs(apart) < STALE_SECONDS and not _died_here(facts)
    return Holder(str(facts.get("host", "")), int(facts.get("pid", 0)), max(0.0, apart), released, working)


def _wait_for_death(folder: str, number: int, say: Callable[[str], None]) -> None:
    """Return when the holder of a number does not live; raise RunError as soon as it is heard of."""
    facts = _read(folder, number)
    if facts.get("released") or _died_here(facts):
        return
    _refuse_fresh(folder)
    say(
        f"process {facts.get('pid')} on {facts.get('host')} held this run and did not renew its lease lately: "
        f"watching for {STALE_SECONDS:.0f} s whether it lives"
    )
    started = clock()
    while True:
        sleep(LOOK_SECONDS)
        # Before the look: a look that comes late, because this process was stalled itself, is one all the same.
        passed = clock() - started
        now = _read(folder, number)
        if now.get("released"):
            return
        if now != facts:
            _refuse(folder, now)
        if passed >= STALE_SECONDS:
            return


def _refuse_fresh(folder: str) -> None:
    register = Register(folder)
    facts = _read(folder, register.latest())
    found = _holder(facts)
    if found.working and abs(time.time() - float(facts.get("renewed", 0.0))) < FRESH_SECONDS:
        _refuse(folder, facts)


def _refuse(folder: str, facts: dict[str, Any]) -> None:
    found = _holder(facts)
    raise RunError(
        f"is being worked on by process {found.pid} on {found.host} ({found.age:.0f} s ago)",
        where=folder.rsplit("/", 1)[0],
        hint=f"stop it first; a driver that has died is replaced after {STALE_SECONDS:.0f} seconds",
    )


def _died_here(facts: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that is gone: then nobody need wait."""
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


def _read(folder: str, number: int) -> dict[str, Any]:
    try:
        found = storage.read_json(Register(folder).file(number))
    except InputError:
        return {}  # swept or damaged; a holder that lives writes it again
    return found if isinstance(found, dict) else {}


def _content(*, released: bool, beats: int = 0) -> bytes:
    facts = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "renewed": time.time(),
        "beats": beats,
        # Of a put whose answer was lost, the second try finds its own bytes (`Register.swap`).
        "token": secrets.token_hex(8),
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
