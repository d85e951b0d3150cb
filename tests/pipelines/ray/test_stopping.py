"""SIGTERM and SIGHUP end a command as Ctrl-C does: noted, in one line, resumable."""

from __future__ import annotations

import os
import signal

import pytest
import typer

from pipelines.commands.shared import guarded
from pipelines.ray.stopping import Stopped, listen, stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_in_one_line(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as caught, guarded():  # noqa: PT012 - the signal comes between
        os.kill(os.getpid(), number)
        signal.pause()
    assert caught.value.exit_code == code
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"memscan: stopped by {name}; run the same command to resume\n"
    assert signal.getsignal(number) == before


def test_a_handler_that_a_library_puts_is_replaced_and_a_second_signal_does_not_disturb() -> None:
    cleaned = False
    with stopping():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(9))  # as Ray does
        listen()
        with pytest.raises(Stopped):  # noqa: PT012 - the clean-up is the subject
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGHUP)
                cleaned = True
    assert cleaned


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_noted_as_an_interruption() -> None:
    assert issubclass(Stopped, KeyboardInterrupt)
    assert str(Stopped(signal.SIGTERM)) == "SIGTERM"


def test_an_interrupt_that_arrives_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once from the terminal or a group's signal, once more from the watcher; a second one of a person counts."""
    before = signal.getsignal(signal.SIGINT)
    cleaned = 0
    with stopping():
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the clean-up is the subject
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned += 1
        monkeypatch.setattr("pipelines.ray.stopping.TWICE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert cleaned == 1
    assert signal.getsignal(signal.SIGINT) is before
