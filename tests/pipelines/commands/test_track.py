"""What a tracker is told, by stand-ins with the calls of MLflow and Weights & Biases that are used."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands import track
from pipelines.commands.track import Outcome, Tracker


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **calls: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in calls.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both trackers, and what they are told."""
    heard: dict[str, Any] = {}

    @contextlib.contextmanager
    def start_run(run_name: str) -> Iterator[None]:
        heard["mlflow"] = {"name": run_name, "files": []}
        yield

    installed(
        monkeypatch,
        "mlflow",
        start_run=start_run,
        log_params=lambda params: heard["mlflow"].update(params={**heard["mlflow"].get("params", {}), **params}),
        log_metrics=lambda metrics: heard["mlflow"].update(metrics=metrics),
        log_artifact=lambda file: heard["mlflow"]["files"].append(file),
    )

    def init(name: str, job_type: str, config: dict[str, Any]) -> Any:
        heard["wandb"] = {"name": name, "params": config, "files": [], "finished": False}
        return SimpleNamespace(
            log=lambda metrics: heard["wandb"].update(metrics=metrics),
            save=lambda file, base_path, policy: heard["wandb"]["files"].append(file),
            finish=lambda: heard["wandb"].update(finished=True),
        )

    installed(monkeypatch, "wandb", init=init)
    return heard


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_reduced_census_is_told(told: dict[str, Any], run_dir: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["reduce", str(run_dir), "--track", name])
    assert result.exit_code == 0, result.output
    assert f"tracked       {name}: synthetic census" in result.stderr
    census = json.loads((run_dir / "census.json").read_text())
    heard = told[name]
    assert heard["metrics"]["vm.rate"] == census["prompts"]["classes"]["VM"]["rate"]
    assert heard["metrics"]["flagged"] == census["counts"]["flagged"]
    assert all(isinstance(value, float) for value in heard["metrics"].values())
    assert heard["params"]["generator.path"] == "models/checkpoint"
    assert heard["params"]["fingerprint"] == census["run"]["fingerprint"]
    assert heard["files"] == [f"{run_dir}/census.json", f"{run_dir}/report.html"]
    assert told.get("wandb", {"finished": True})["finished"]


def test_a_tracker_that_is_not_installed_is_refused_first(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["reduce", str(run_dir), "--track", "wandb"])
    assert result.exit_code == 2
    assert result.stderr == "memscan: --track: wandb is not installed; pip install wandb\n"
    assert not (run_dir / "census.json").exists()


def test_a_tracker_that_fails_costs_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("no route to https://user:secret@host/api")

    installed(monkeypatch, "mlflow", start_run=refuse)
    said: list[str] = []
    track.tell(Tracker.MLFLOW, Outcome("run", {}, {"rate": 0.5}), said.append)
    assert len(said) == 1
    assert "mlflow was not told (ConnectionError" in said[0]
    assert "secret" not in said[0]
