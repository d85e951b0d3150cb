"""`memscan plan`: from a sample, from recorded rates, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from memscan.errors import IndexLoadError
from memscan.planning import Failures
from pipelines.cli import app
from pipelines.plan.job import BLOCK_SECONDS, describe, make_plan
from pipelines.plan.measure import measure, pace_of
from pipelines.plan.rates import Rates, read_rates

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


def test_a_sample_without_an_index(tiny_world: Any, in_process: None, tmp_path: Path) -> None:
    """The first references take the index's place, and what they take is planned as well; two pools of workers."""
    rates = measure(tiny_world.config(tmp_path / "run", resources__judges=1), 10)
    assert set(rates.stages) == {"sample", "judge"}
    assert (rates.references, rates.device, rates.sample, rates.workers, rates.block) == (25, "cpu", 10, 1, 4)
    measured = [*rates.stages.values(), rates.startup, rates.write, rates.commit, rates.index]
    assert all(value and 0 < value < float("inf") for value in measured)
    assert rates.bytes_per_prompt > 100
    assert not (tmp_path / "run").exists()
    plan = make_plan(tiny_world.config(tmp_path / "run"), rates, prompts=100, workers=5, failures=Failures())
    assert plan["index"]["seconds"] == pytest.approx(25 / (5 * (rates.index or 0)))


def test_a_mistake_in_a_worker_is_one_line(
    tiny_world: Any, complete_run: Path, in_process: None, tmp_path: Path
) -> None:
    """What only loading finds out: the index was made by another embedder."""
    config = tiny_world.config(tmp_path / "run", index__path=str(complete_run / "index"), embedder__size=48)
    with pytest.raises(IndexLoadError) as caught:
        measure(config, 4)
    assert len(str(caught.value).splitlines()) == 1


def test_a_rate_says_how_sure_it_is(tiny_world: Any, tmp_path: Path) -> None:
    first = pace_of([[(16, 96.0)]], loaded=3.0)  # one block, slow as a first one is
    assert (first.rate, first.blocks, first.uncertainty) == (pytest.approx(1 / 6), 1, None)
    more = pace_of([[(16, 96.0), (16, 4.0), (16, 5.0)], [(16, 90.0), (16, 4.5)]], loaded=3.0)
    assert more.blocks == 3  # without each worker's first
    assert 3.3 < more.rate < 3.7
    values = [4.0 / 16, 5.0 / 16, 4.5 / 16]
    interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert more.uncertainty == pytest.approx((interval[1] - interval[0]) / 2 / np.mean(values))
    assert more.startup == pytest.approx(3.0 + np.mean([96 - 16 / (32 / 9), 90 - 4.5]))
    for pace, said in ((first, "wrong by several times"), (more, "± ")):
        rates = Rates(
            {"census": pace.rate},
            1.0,
            1.0,
            "cpu",
            16,
            blocks={"census": pace.blocks},
            uncertainty={"census": pace.uncertainty},
        )
        plan = make_plan(tiny_world.config(tmp_path / "run"), rates, prompts=100, workers=1, failures=Failures())
        assert said in describe(plan)


def plan_of(tiny_world: Any, tmp_path: Path, workers: int = 64, **changes: Any) -> dict[str, Any]:
    rates = Rates(**{**RATES, "stages": {"census": 4.0}, **changes})
    config = tiny_world.config(tmp_path / "run", resources__prompts_per_block=16)
    return make_plan(config, rates, prompts=100_000, workers=workers, failures=Failures(), runs=1)


def test_what_comes_last_can_be_the_bottleneck(tiny_world: Any, tmp_path: Path) -> None:
    calm = plan_of(tiny_world, tmp_path, write=100.0, commit=10_000.0)
    assert (calm["bottleneck"], calm["prompts_per_second"]) == ("census", 256.0)  # a cluster has many writers
    small = plan_of(tiny_world, tmp_path, workers=8, write=10.0, commit=10_000.0)
    assert (small["bottleneck"], small["prompts_per_second"]) == ("write", 20.0)  # one machine has one for four workers
    slow = plan_of(tiny_world, tmp_path, commit=200.0)
    assert slow["bottleneck"] == "driver"
    assert slow["prompts_per_second"] == pytest.approx(1 / (1 / 200 + BLOCK_SECONDS / 16))


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
        (json.dumps({**RATES, "write": -1}), []),
        (json.dumps({**RATES, "device": 7}), []),
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


def test_without_index_and_references_it_says_what_to_do(tmp_path: Path) -> None:
    places = ["--set", "index.source=null", "--set", f"index.path={tmp_path / 'index'}"]
    result = invoke("--set", f"out={tmp_path / 'run'}", *places, "--sample", "2")
    assert result.exit_code == 2
    assert "memscan index build" in result.stderr


@pytest.mark.parametrize("prices", ["gpu_hour: -1", "gpu_hour: true", "hourly: 3", "- 1", "a: [", "gpu_hour: .nan"])
def test_a_price_table_that_is_none(recorded: str, tmp_path: Path, prices: str) -> None:
    (tmp_path / "prices.yaml").write_text(prices)
    result = invoke("--rates", recorded, "--prices", str(tmp_path / "prices.yaml"))
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)
