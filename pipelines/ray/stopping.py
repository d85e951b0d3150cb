"""This module makes signals end a command as Ctrl-C does: those of Kubernetes, Slurm and a lost terminal.

When Ray starts, it sets its own handler for SIGTERM, which ends the process in the middle of its work. So ours is set
again after that. A second signal changes nothing, because the first one is being handled. A second Ctrl-C counts only
after TWICE_SECONDS, because one that is sent to a whole group of processes arrives twice, the second time from our
watcher.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

TWICE_SECONDS = 1.0


class _Last:
    """When this process was interrupted last, in seconds of the monotonic clock."""

    interrupted = float("-inf")


class Stopped(KeyboardInterrupt):
    """Somebody asked this process to end.

    It is a KeyboardInterrupt, so that code that handles an interrupt handles it too.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """This is the exit code that a shell reports for a process that a signal ended."""
        return 128 + self.number


@contextmanager
def stopping() -> Iterator[None]:
    """Make signals raise `Stopped` inside the block, in the main thread; in other threads nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGINT)}
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def listen() -> None:
    """Put the handlers, again where a library has put others; a signal that is ignored (nohup) stays ignored."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    now = time.monotonic()
    if now - _Last.interrupted >= TWICE_SECONDS:
        _Last.interrupted = now
        raise KeyboardInterrupt


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise Stopped(number)
