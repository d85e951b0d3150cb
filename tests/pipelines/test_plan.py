"""`memscan plan`: from a sample, from recorded rates, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memscan.planning import Failures
from pipelines.cli import app
from pipelines.plan import Rates, make_plan, measure, read_rates

RATES = {
    "stages": {"census": 0.5},
    "startup": 20.0,
    "bytes_per_prompt": 2000.0,
    "device": "cuda",
    "sample": 100,
}


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    return str(tmp_path / "rates.json")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", "--world", "shipped", *arguments])


def test_recorded_rates_and_prices(recorded: str, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("gpu_hour: 2\ngb_month: 0.5\n")
    prices = str(tmp_path / "prices.yaml")
    result = invoke("--gpus", "8", "--prompts", "1e5", "--rates", recorded, "--prices", prices, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["workers"] == {"census": 8}
    assert plan["bottleneck"] == "census"
    seconds = plan["expected"]["seconds"]
    assert 100_000 / 4 + 20 <= seconds <= 100_000 / 4 + 20 + 16 / 0.5
    assert plan["expected"]["gpu_hours"] == pytest.approx(8 * seconds / 3600)
    assert plan["storage_bytes"] == 200_000_000
    assert plan["cost"]["gpu"] == pytest.approx(2 * plan["expected"]["gpu_hours"])
    assert plan["cost"]["total"] == pytest.approx(plan["cost"]["gpu"] + 0.5 * 0.2)


def test_text_and_losses(recorded: str) -> None:
    result = invoke("--gpus", "8", "--prompts", "1e5", "--rates", recorded, "--lost-every", "10")
    assert result.exit_code == 0, result.output
    assert "the bottleneck is census" in result.stdout
    assert "GPU-hours" in result.stdout


def test_two_pools_on_processes_are_split_by_their_rates(tiny_world: Any, tmp_path: Path) -> None:
    rates = Rates({"sample": 1.0, "judge": 4.0}, 0.0, 1.0, "cpu", 10)
    config = tiny_world.config(tmp_path / "run", resources__judges=1)
    plan = make_plan(config, rates, prompts=1000, workers=10, failures=Failures())
    assert plan["workers"] == {"sample": 8, "judge": 2}


@pytest.mark.parametrize("judges", [None, 1])
def test_a_sample_is_timed_stage_by_stage(tiny_world: Any, complete_run: Path, tmp_path: Path, judges: Any) -> None:
    config = tiny_world.config(
        tmp_path / "run", index__path=str(complete_run / "index"), **({"resources__judges": 1} if judges else {})
    )
    rates = measure(config, 6)
    assert set(rates.stages) == ({"sample", "judge"} if judges else {"census"})
    assert all(rate > 0 for rate in rates.stages.values())
    assert rates.startup > 0
    assert rates.bytes_per_prompt > 100
    assert rates.sample >= 6


def test_saved_rates_are_read_again(recorded: str, tmp_path: Path) -> None:
    again = str(tmp_path / "again.json")
    assert invoke("--rates", recorded, "--save", again).exit_code == 0
    assert read_rates(again) == Rates(**RATES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ("[1, 2]", []),
        ("{", []),
        ('{"stages": {"census": "fast"}}', []),
        (json.dumps({**RATES, "stages": {"census": 0}}), []),
        (json.dumps({**RATES, "stages": {"other": 1}}), []),
        (json.dumps(RATES), ["--prompts", "0"]),
        (json.dumps(RATES), ["--prompts", "nan"]),
        (json.dumps(RATES), ["--lost-every", "-1"]),
        (json.dumps(RATES), ["--prices", "nowhere.yaml"]),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, content: str, arguments: list[str]) -> None:
    (tmp_path / "rates.json").write_text(content)
    result = invoke("--rates", str(tmp_path / "rates.json"), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_an_index_it_says_what_to_do(tmp_path: Path) -> None:
    result = invoke("--set", f"out={tmp_path / 'run'}", "--sample", "2")
    assert result.exit_code == 2
    assert "memscan index build" in result.stderr
