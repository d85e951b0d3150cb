"""Where this machine's cache is, and what it has no room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from memscan.errors import MemscanError
from memscan.io.cache import cache_folder, check_room, one_at_a_time


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/a/own", "/b/xdg", "/a/own"), ("", "/b/xdg", "/b/xdg/memscan"), (None, None, "/home/me/.cache/memscan")],
)
def test_cache_folder(own: str | None, xdg: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in {"MEMSCAN_CACHE": own, "XDG_CACHE_HOME": xdg}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


def test_a_copy_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSCAN_CACHE", str(tmp_path / "cache"))
    check_room(1, "s3://bucket/model")
    with pytest.raises(MemscanError, match="do not fit") as caught:
        check_room(10**18, "s3://bucket/model")
    assert "s3://bucket/model" in str(caught.value)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MemscanError, match="MEMSCAN_CACHE"), one_at_a_time(tmp_path / "file" / "inner" / ".lock"):
        pass
