"""Two nightlies on one registry, and a registry that was moved; what is scanned is a stand-in, the rest is real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memscan.census.policy import NightlyConfig
from memscan.errors import RunError
from pipelines.nightly import job
from pipelines.nightly.job import NightlyResult, Registry, nightly
from pipelines.nightly.registry import Candidate
from pipelines.run_folder import lease

CANDIDATES = [Candidate(name, "source", f"source/{name}", None, "0" * 16) for name in ("step-1", "step-2")]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(job, "find", lambda *_: list(CANDIDATES))
    monkeypatch.setattr(job, "strangers", lambda *_: [])
    monkeypatch.setattr(job, "publish", lambda *_: None)
    settings = {"name": "n", "out": str(tmp_path / "registry"), "webhook": None, "baseline": None, "watch": []}
    return SimpleNamespace(**settings, panel=lambda: None)


def record(candidate: Candidate, sequence: int) -> dict[str, Any]:
    facts = {"name": candidate.name, "source": candidate.source, "stamp": candidate.stamp}
    return {"format": job.FORMAT, **facts, "sequence": sequence, "passed": False}


def test_what_another_nightly_scanned_until_the_lease_was_had_is_not_scanned_again(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, asked = Registry(config.out), []

    def scan_new(_config: Any, _registry: Any, _panel: Any, new: list[Candidate], _say: Any) -> NightlyResult:
        asked.extend(candidate.name for candidate in new)
        return NightlyResult([], {}, [])

    def taken(folder: str, *rest: Any) -> lease.Lease:
        Path(registry.record("a")).parent.mkdir(parents=True, exist_ok=True)
        Path(registry.record("a")).write_text(json.dumps(record(CANDIDATES[0], 1)))  # by the other one, just before
        return take(folder, *rest)

    take = lease.take
    monkeypatch.setattr(lease, "take", taken)
    monkeypatch.setattr(job, "_scan_new", scan_new)
    nightly(config)
    assert asked == ["step-2"]


def test_a_record_that_is_there_is_not_overwritten_by_one_that_comes_late(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(config.out)
    place = Path(registry.record(CANDIDATES[0].slug))

    def scan_one(*_: Any) -> dict[str, Any]:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(record(CANDIDATES[0], 1)))  # meanwhile
        return {**record(CANDIDATES[0], 1), "passed": True}

    monkeypatch.setattr(job, "_scan_one", scan_one)
    with pytest.raises(RunError, match="has been recorded by another nightly"):
        job._scan_all(config, registry, SimpleNamespace(), 1, CANDIDATES[:1], lambda _: None)  # type: ignore[arg-type]
    assert json.loads(place.read_text())["passed"] is False


def test_a_registry_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own index has another path then and is the same one; another panel is refused as ever."""
    old, new = Registry(str(tmp_path / "old")), Registry(str(tmp_path / "new"))
    Path(old.path).mkdir()
    content = {"index.path": f'"{old.index}"', "generator.steps": "20"}
    panel = {"format": 1, "content": content, "index": {"version": 1, "hash": "h"}}
    Path(old.panel).write_text(json.dumps(panel))
    shutil.move(old.path, new.path)
    monkeypatch.setattr("memscan.index.manifest.Manifest.load", lambda *_: SimpleNamespace(version=1, hash="h"))
    placed: Any = SimpleNamespace(index=SimpleNamespace(path=new.index))
    now = {**content, "index.path": f'"{new.index}"'}
    monkeypatch.setattr(job, "_panel_content", lambda _: now)
    assert job._check_panel(SimpleNamespace(), new, placed) == 1  # type: ignore[arg-type]
    now["generator.steps"] = "30"
    with pytest.raises(RunError, match=r"generator\.steps: 20 -> 30"):
        job._check_panel(SimpleNamespace(), new, placed)  # type: ignore[arg-type]
