"""Machines on which Ray would not start, and would say so late, at length or wrongly: one line, or provided for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memscan.errors import MemscanError
from pipelines.ray import place
from pipelines.ray.place import SOCKET_BYTES, check_place, token
from pipelines.ray.session import start


@pytest.fixture(autouse=True)
def _none_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a shorter path than pytest's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_place_with_room(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short / "made"))
    check_place()
    assert [one.name for one in (short / "made").iterdir()] == ["ray"]
    assert not list((short / "made" / "ray").iterdir())


def test_too_long_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly where Ray itself would refuse, found before it is asked."""
    from ray._private.utils import validate_socket_filepath

    for length in range(20, 80):
        folder = Path("/tmp") / ("x" * (length - 5))
        sockets = str(folder / place._PATH.format(pid=os.getpid()))
        if len(sockets) <= SOCKET_BYTES:
            validate_socket_filepath(sockets)
            continue
        with pytest.raises(OSError, match="AF_UNIX"):
            validate_socket_filepath(sockets)
        name = ("RAY_TMPDIR", "TMPDIR")[length % 2]
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setenv(name, str(folder))
        with pytest.raises(MemscanError, match=rf"{name}=/tmp/x+: is too long for Ray's sockets.*short path"):
            check_place()
        assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_place_that_cannot_be_written(number: int, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MemscanError, match=rf"TMPDIR=.*: Ray cannot write there .{os.strerror(number)}.; set RAY_TMP"):
        check_place()


def test_a_place_that_is_nearly_full(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=700, f_frsize=4096))
    with pytest.raises(MemscanError, match="has 2 MiB free, and Ray needs 100"):
        start()  # Ray is not asked


def test_a_home_that_cannot_be_written_gets_a_token_for_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.write_text("no folder can be made in a file, not even by root")
    monkeypatch.setenv("HOME", str(home))
    with token():
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ
    home.unlink()
    home.mkdir()
    with token():
        assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_token_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/some/where")
    with token():
        assert "RAY_AUTH_TOKEN" not in os.environ


def test_ray_reads_the_token_and_does_not_start_the_workers_by_uv(tmp_path: Path) -> None:
    """Ray's own check of a new cluster where the home folder cannot be written, and its hook for `uv run`."""
    code = (
        "from pipelines.ray import session\n"
        "from pipelines.ray.place import token\n"
        "import ray._private.worker as worker\n"
        "from ray._private.authentication import authentication_token_setup as ray_tokens\n"
        "from ray._private.runtime_env import uv_runtime_env_hook as uv\n"
        "with token():\n"
        "    ray_tokens.enable_token_auth_by_default()\n"
        "    ray_tokens.ensure_token_if_auth_enabled()\n"
        "uv._get_uv_run_cmdline = lambda: ['uv', 'run', 'memscan']\n"
        "uv.hook = lambda env: 'by uv'\n"
        "assert worker._maybe_modify_runtime_env({}, False) == 'by uv'\n"
        "with session.worker_environment():\n"
        "    session._never_connect_by_itself()\n"
        "    assert worker._maybe_modify_runtime_env({}, False) == {}\n"
        "print('good')\n"
    )
    environment = {**os.environ, "HOME": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "good\n", done.stderr
