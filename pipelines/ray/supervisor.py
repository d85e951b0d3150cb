"""This module watches a command.

Whatever ends the command silently, one line says what died and what to do.

    watcher (the process that was started) ── fork ──▶ driver (the command)
       waits for signals and for deaths     ◀── pipe ── which run it works on, Ray's processes, its exit code

Ray ends its driver from C++ when its raylet or its control store (GCS) dies: no exception, no line, exit code 1. The
kernel's out-of-memory killer does the same to any process. The driver tells the watcher its exit code when it ends by
itself; if a driver ends without doing so, the watcher explains it, and also notes it in the run.

The fork comes before anything heavy is imported, so it costs some milliseconds and little memory. Both are in one
process group: they share the terminal, standard input and Ctrl-C. Signals that are sent to the watcher alone are passed
on; what stops it (SIGSTOP) stops the driver, and what kills it kills the driver. On a system that is not Linux, and if
a job is called from Python, there is no watcher, and `memscan status` finds out by itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pipelines.ray.logs import json_line

RESUME = "run the same command to resume"
# A driver whose raylet or control store is gone cannot go on; Ray notices the second after a minute only.
GRACE_SECONDS = 10.0
LOOK_SECONDS = 0.5
_RAYS_CODE, _APART_SECONDS = 1, 2.0
NAMES = {"raylet": "raylet", "gcs_server": "control store (GCS)"}

_PASSED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_FROM_KERNEL = 0x80  # si_code of a key on the terminal, which reaches the driver as well
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_POSSIBLE = sys.platform == "linux" and hasattr(os, "pidfd_open")


class _Pipe:
    """Of the driver: where it tells the watcher; None if there is no watcher."""

    writing: int | None = None


def tell(**facts: Any) -> None:
    """Tell the watcher facts that count from now on; nothing if there is none.

    Args:
        facts: `run` ([folder, epoch], or None when it is done with), `ray` (name -> process number of the processes
            that the driver cannot live without), `address` of a cluster that was joined, `logs` (folder), `json`
            (whether lines are JSON), `exit` (the code that the driver is about to end with).
    """
    if _Pipe.writing is not None:
        with suppress(OSError):
            os.write(_Pipe.writing, json.dumps(facts).encode() + b"\n")


def supervised(work: Callable[[], None]) -> None:
    """Do `work` in a child process that this process watches.

    It returns, or raises as `work` does, in the child only.
    """
    open_streams()
    if not _POSSIBLE:
        return work()
    numbers = {number for name in _PASSED if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN}
    waited = numbers | {signal.SIGCHLD, signal.SIGCONT}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reading, writing = os.pipe()
    before, watcher = signal.pthread_sigmask(signal.SIG_BLOCK, waited), os.getpid()
    try:
        driver = os.fork()
    except OSError:  # no process to be had: better without a watcher than not at all
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()
    if driver == 0:
        os.close(reading)
        _Pipe.writing = writing
        _follow(watcher)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _with_last_word(work)
    os.close(writing)
    _watch(driver, reading, waited)


def open_streams() -> None:
    """Open what the caller closed of standard input, output and error, or the next file would become one of them."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):  # of a system without /dev/null
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115


def _with_last_word(work: Callable[[], None]) -> None:
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    except KeyboardInterrupt:  # before the command could see to it
        code = 130
        raise
    finally:
        tell(exit=code if isinstance(code, int) else 0 if code is None else 1)


def _follow(watcher: int) -> None:
    """Of the driver: die with the watcher, and stop with it."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != watcher:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_look_after, args=(watcher,), name="watcher", daemon=True).start()


def _look_after(watcher: int) -> None:
    """SIGSTOP reaches no handler that could pass it on: a stopped watcher is seen; SIGCONT is passed on (`_watch`)."""
    while os.getppid() == watcher:
        with suppress(OSError, IndexError):
            if Path(f"/proc/{watcher}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(LOOK_SECONDS)


@dataclass
class Seen:
    """This is what the watcher knows about its driver.

    Attributes:
        facts: as they were told last.
        died: name -> when one of Ray's processes was seen to end, in seconds of the monotonic clock, while the driver
            still needed it.
        needed: name -> number of these processes.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    died: dict[str, float] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)


def _watch(driver: int, reading: int, waited: set[signal.Signals]) -> NoReturn:
    seen = Seen()
    listener = threading.Thread(target=_listen, args=(reading, seen), daemon=True)
    listener.start()
    asked: set[int] = set()
    continued: list[float] = []  # when SIGCONT is to be sent again: the driver may be about to stop
    status = None
    while status is None:
        info = signal.sigtimedwait(waited, 1.0) if seen.died or continued else signal.sigwaitinfo(waited)
        number = info.si_signo if info is not None else 0
        if number == signal.SIGCONT:
            continued = [time.monotonic() + LOOK_SECONDS, time.monotonic() + 3 * LOOK_SECONDS]
            os.kill(driver, signal.SIGCONT)
        elif number not in (0, signal.SIGCHLD):
            asked.add(number)
            if info is not None and info.si_code != _FROM_KERNEL:
                os.kill(driver, number)
        if continued and time.monotonic() >= continued[0]:
            continued.pop(0)
            os.kill(driver, signal.SIGCONT)
        status = _ended(driver)
        if status is None and seen.died and time.monotonic() > min(seen.died.values()) + GRACE_SECONDS:
            os.kill(driver, signal.SIGKILL)
    listener.join(timeout=5.0)  # it ends with the driver, but on a busy machine not at once
    code, line = explained(driver, status, seen, asked)
    if line is not None:
        _note(seen.facts.get("run"), line)
        _say(f"memscan: {line}", as_json=bool(seen.facts.get("json")))
    os._exit(code)


def _ended(driver: int) -> int | None:
    """The driver's wait status, once it has ended; what else ended is reaped (in a container this may be process 1)."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if process == driver:
            return status
        if process == 0:
            return None


def _listen(reading: int, seen: Seen) -> None:
    """Read what the driver tells, and see its Ray's processes end, until the driver is gone."""
    poller, names, rest = select.poll(), dict[int, str](), b""
    poller.register(reading, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poller.poll()]
        for descriptor in ready:
            if descriptor in names:
                seen.died.setdefault(names.pop(descriptor), time.monotonic())
                poller.unregister(descriptor)
                os.close(descriptor)
                os.kill(os.getpid(), signal.SIGCHLD)  # wakes `_watch`
        if reading in ready:
            told = os.read(reading, 65536)
            if not told:
                return
            *lines, rest = (rest + told).split(b"\n")
            for line in lines:
                facts = json.loads(line)
                seen.facts.update(facts)
                if "ray" in facts:
                    for descriptor in names:
                        poller.unregister(descriptor)
                        os.close(descriptor)
                    if facts["ray"]:  # a new Ray; the driver's farewell to the old one does not bring it back to life
                        seen.died.clear()
                        seen.needed = facts["ray"]
                    names = _open(facts["ray"])
                    for name in facts["ray"].keys() - names.values():  # gone before it could be watched
                        seen.died.setdefault(name, time.monotonic())
                        os.kill(os.getpid(), signal.SIGCHLD)
                    for descriptor in names:
                        poller.register(descriptor, select.POLLIN)


def _open(processes: Mapping[str, int]) -> dict[int, str]:
    found = {}
    for name, process in processes.items():
        with suppress(OSError):
            found[os.pidfd_open(process)] = name
    return found


def explained(driver: int, status: int, seen: Seen, asked: set[int]) -> tuple[int, str | None]:
    """Return the exit code of the command, and why it ended if the driver did not say so itself.

    Args:
        driver: its process number.
        status: as `os.waitpid` gives it.
        asked: signals that the watcher has received.
    """
    told, number = seen.facts.get("exit"), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if told is not None:  # whatever a library did while the interpreter ended
        return int(told), None
    code = 128 + number if number else os.waitstatus_to_exitcode(status)
    if number in asked:  # before the command could see to it
        return code, f"stopped by {signal.Signals(number).name}; {RESUME}"
    if not number and code == 0:
        return 0, None
    logs = f"; see {seen.facts['logs']}/ray.log" if seen.facts.get("logs") else ""
    # The driver's own end takes its raylet and control store with it, so what is gone just now says little; but Ray
    # ends a driver by code 1, and one that goes on for long without them is ended by us.
    first = min(seen.died, key=lambda name: (round(seen.died[name], 1), name != "raylet"), default=None)
    gone = 0.0 if first is None else time.monotonic() - seen.died[first]
    if first is not None and (code == _RAYS_CODE or gone > (GRACE_SECONDS if number else _APART_SECONDS)):
        who = f"Ray's {NAMES.get(first, first)} (process {seen.needed[first]})"
        return 1, f"{who} died, and the driver cannot go on without it; {RESUME}{logs}"
    if number:
        usual = " (by a person, or by the kernel because memory was short)" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        return code, f"the driver (process {driver}) was ended by {name}{usual}; {RESUME}{logs}"
    if seen.facts.get("address"):
        return code, f"{_of_cluster(str(seen.facts['address']))}; {RESUME}{logs}"
    return code, f"the driver (process {driver}) ended with exit code {code} and without a message; {RESUME}{logs}"


def _of_cluster(address: str) -> str:
    import socket

    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            pass
    except (OSError, ValueError):
        return f"the head of the Ray cluster at {address} does not answer any more, and the driver cannot go on"
    return f"the driver lost the Ray cluster at {address} (its raylet on this machine, or the way to its head)"


def _note(run: Any, why: str) -> None:
    """Say in the run's state that it failed, as long as it is this driver's, and give its lease back."""
    if not run:
        return
    from pipelines.run_folder.lease import Lease
    from pipelines.run_folder.runs import Run

    folder, epoch = run
    with suppress(Exception):  # a store that is away: `memscan status` finds out by the lease
        found = Run.load(folder)
        found.lease = Lease(found.folder.leases, epoch)
        found.lease.check()
        if found.manifest["state"] == "running":
            found.stop("failed", why)
        found.lease.release()


def _say(line: str, *, as_json: bool) -> None:
    with suppress(OSError):
        os.write(2, (json_line(line, level="error") if as_json else line).encode() + b"\n")
