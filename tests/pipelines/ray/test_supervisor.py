"""Whatever ends a command without a word is told by its watcher; what it says itself is passed on as it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.ray import supervisor
from pipelines.ray.supervisor import GRACE_SECONDS, RESUME, Seen, explained
from pipelines.run_folder import lease as leases
from pipelines.run_folder.identity import identity
from pipelines.run_folder.runs import Run
from tests.pipelines.run_folder.test_protocol import prompts, settings

ROOT = Path(__file__).resolve().parents[3]
# The command of these tests: says its process number, has a "raylet" that is a process asleep, and then does a thing.
COMMAND = """
import ctypes, os, signal, subprocess, sys, time
from pipelines.ray import supervisor
def work():
    ray = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: ctypes.CDLL(None).prctl(1, 9))
    supervisor.tell(ray={{"raylet": ray.pid}}, logs="L")
    print(os.getpid(), ray.pid, flush=True)
    {work}
supervisor.supervised(work)
"""
WAIT = "time.sleep(60)"


@contextmanager
def command(work: str, **how: Any) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A supervised command; gives it, and the process numbers of its driver and "raylet"."""
    code = COMMAND.format(work=work.replace("\n", "\n    "))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    try:
        assert process.stdout is not None
        driver, raylet = map(int, process.stdout.readline().split())
        yield process, driver, raylet
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def gone(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit('memscan: no')", 1, "memscan: no\n"),
        ("supervisor.tell(exit=143); os.abort()", 143, ""),  # a library that fails while all is cleared away
        ("print(sys.stdin.read(), file=sys.stderr, end='')", 0, "typed"),
    ],
)
def test_what_a_command_says_itself_is_all_that_is_said(work: str, code: int, said: str) -> None:
    with command(work, stdin=subprocess.PIPE) as (process, _, _):
        out, err = process.communicate("typed", timeout=30)
        assert (process.returncode, out, err) == (code, "", said)


def test_a_raylet_that_dies_takes_the_driver_and_is_named() -> None:
    """As Ray does it: the driver is ended from C++ by `_exit(1)`."""
    with command("ray.wait(); os._exit(1)") as (process, _, raylet):
        os.kill(raylet, signal.SIGKILL)
        line = f"memscan: Ray's raylet (process {raylet}) died, and the driver cannot go on without it; {RESUME}"
        assert end(process) == (1, f"{line}; see L/ray.log\n")


def test_a_raylet_that_died_before_it_could_be_watched_is_named() -> None:
    """The watcher reads the raylet's number only after it has died and was reaped: no process has that number."""
    with command("ray.kill(); ray.wait(); supervisor.tell(ray={'raylet': ray.pid}); os._exit(1)") as (
        process,
        _,
        raylet,
    ):
        assert f"Ray's raylet (process {raylet}) died" in end(process)[1]


def test_a_driver_that_is_killed_is_named_and_takes_its_ray_along() -> None:
    with command(WAIT) as (process, driver, raylet):
        os.kill(driver, signal.SIGKILL)
        code, said = end(process)
        assert code == 137
        assert said.startswith(f"memscan: the driver (process {driver}) was ended by SIGKILL (by a person, or by the")
        assert len(said.splitlines()) == 1
        assert RESUME in said
        wait_for(lambda: gone(raylet))


def test_a_driver_that_ends_without_a_word() -> None:
    with command("os._exit(7)") as (process, driver, _):
        line = f"memscan: the driver (process {driver}) ended with exit code 7 and without a message; {RESUME}"
        assert end(process) == (7, f"{line}; see L/ray.log\n")


def test_a_watcher_that_is_killed_takes_the_driver_along() -> None:
    with command(WAIT) as (process, driver, _):
        process.kill()
        process.wait()
        wait_for(lambda: gone(driver))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(number: int) -> None:
    work = f"signal.signal({int(number)}, lambda *_: sys.exit(100 + {int(number)}))\nprint(flush=True)\n{WAIT}"
    with command(work) as (process, _, _):
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert end(process) == (100 + number, "")


def test_nohup_stays_nohup() -> None:
    quiet = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with command("time.sleep(0.5)", **quiet) as (process, _, _):
        process.send_signal(signal.SIGHUP)
        assert end(process) == (0, "")


def test_a_signal_before_the_command_is_ready_for_it() -> None:
    with command(WAIT) as (process, _, _):
        process.send_signal(signal.SIGTERM)
        assert end(process) == (143, f"memscan: stopped by SIGTERM; {RESUME}\n")


def test_a_stopped_watcher_stops_the_driver_until_both_go_on() -> None:
    def state() -> str:
        return Path(f"/proc/{driver}/stat").read_text().rpartition(")")[2].split()[0]

    with command(WAIT) as (process, driver, _):
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: state() == "T")
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: state() != "T")


@pytest.mark.parametrize("closed", ["2", "012"])
def test_closed_streams_do_not_become_files(closed: str, tmp_path: Path) -> None:
    """A file that is opened next must not get the number of a stream, or what is printed is written into it."""
    code = (
        "import sys\nfrom pipelines.ray import supervisor\n"
        "def work():\n"
        "    file = open('kept', 'w+')\n"
        "    print('x', flush=True); print('y', file=sys.stderr, flush=True); sys.stdin.read()\n"
        "    file.seek(0); assert file.read() == '' and file.fileno() > 2; sys.exit(4)\n"
        "supervisor.supervised(work)\n"
    )
    shell = " ".join(["exec", sys.executable, "-c", '"$CODE"', *(f"{number}>&-" for number in closed)])
    environment = {**os.environ, "CODE": code, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 4


def test_the_run_is_noted_as_failed_and_its_lease_given_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path / "run")
    content = identity(config, {})
    run = Run.open(config, content, leases.take(str(tmp_path / "run" / "lease")))
    run.write_prompts(prompts(), 2)
    supervisor._note([run.folder.path, run.epoch], "Ray's raylet died")
    after = Run.load(run.folder.path)
    assert (after.state, after.manifest["error"]) == ("failed", "Ray's raylet died")
    with leases.hold(run.folder.leases) as lease:  # at once
        again = Run.open(config, content, lease)
        supervisor._note([run.folder.path, run.epoch], "too late: another driver has it")
        assert Run.load(run.folder.path).state == again.state == "running"
    supervisor._note(["/nowhere", 1], "no run there")
    supervisor._say("a line", as_json=True)
    assert json.loads(capfd.readouterr().err)["message"] == "a line"


def exited(code: int) -> int:
    return code << 8


@pytest.mark.parametrize(
    ("status", "died", "facts", "code", "said"),
    [
        # Ray's control store dies: the driver would be ended by Ray after a minute, and is by us after GRACE_SECONDS.
        (signal.SIGKILL, {"gcs_server": -GRACE_SECONDS - 1}, {}, 1, "Ray's control store (GCS) (process 8) died"),
        (exited(1), {"gcs_server": -60.0, "raylet": -0.001}, {}, 1, "control store"),
        # The driver's end takes both along; which was first says its own end.
        (exited(1), {"gcs_server": 0.0, "raylet": 0.0}, {}, 1, "Ray's raylet (process 7) died"),
        (signal.SIGKILL, {"gcs_server": 0.0, "raylet": 0.0}, {}, 137, "was ended by SIGKILL (by a person"),
        (signal.SIGSEGV, {}, {}, 139, "the driver (process 5) was ended by SIGSEGV;"),
        (exited(1), {}, {"address": "127.0.0.1:1"}, 1, "head of the Ray cluster at 127.0.0.1:1 does not answer"),
        (exited(0), {}, {}, 0, None),
    ],
)
def test_what_is_blamed(
    status: int, died: dict[str, float], facts: dict[str, Any], code: int, said: str | None
) -> None:
    now = time.monotonic()
    seen = Seen(facts, {name: now + ago for name, ago in died.items()}, {"raylet": 7, "gcs_server": 8})
    found, line = explained(5, status, seen, set())
    assert found == code
    assert (line is None) == (said is None)
    assert said is None or (line is not None and said in line and RESUME in line)
