"""Joining a cluster that is not there, and never one that nobody named."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest

from memscan.errors import MemscanError
from pipelines.ray.session import start


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError])
def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    import ray

    def away(**_settings: Any) -> None:
        raise kind("Failed to connect to Ray cluster at head:6379")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: nullcontext())
    monkeypatch.setattr(ray, "init", away)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(MemscanError, match=r"RAY_ADDRESS=head:6379: no Ray cluster could be joined .*; is its head up"):
        start()


@pytest.mark.parametrize("address", ["http://head:8265", "head", "head:0", "head:x", "ray://head", "://", "head:99999"])
def test_an_address_that_is_none_of_a_ray_cluster_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MemscanError, match="is not the address of a Ray cluster"):
        start()


def test_a_dead_head_is_given_up_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def refused(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.create_connection", refused)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(MemscanError, match=r"nobody answered within 60 s .Connection refused.; is its head up"):
        start()
    assert 60 <= now[0] < 70


def test_nothing_connects_to_a_ray_by_itself() -> None:
    """What a thread that outlives a session does: it asks Ray for something. That must fail, not find some cluster."""
    code = (
        "from pipelines.ray import session\n"
        "with session.worker_environment():\n"
        "    import ray\n"
        "session._never_connect_by_itself()\n"
        "ray.init = lambda *a, **k: print('connected')\n"
        "try:\n"
        "    ray.put(1)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "connected" not in done.stdout
    assert done.stdout.strip()
