"""Joining a cluster that is not there."""

from __future__ import annotations

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
    monkeypatch.setattr(ray, "init", away)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(MemscanError, match=r"RAY_ADDRESS=head:6379: no Ray cluster could be joined .*; is its head up"):
        start()
