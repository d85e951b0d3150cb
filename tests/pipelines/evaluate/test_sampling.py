"""Label agreement of faster ways of sampling: the comparison by hand, and the evaluation over a complete run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memscan.errors import RunError
from memscan.evaluation.sampling import MODES, REJECTED, agreement_table, compare_labels
from memscan.models.schedulers import SUPPORTED
from pipelines.cli import app
from pipelines.evaluate.sampling import measure_agreement
from tests.support.tiny_world import ORDINARY, SAMPLES


def test_comparison_by_hand() -> None:
    plain = {("a", 0): "VM", ("a", 1): "VM", ("b", 0): "NM", ("b", 1): "FM", ("c", 0): "NM", ("c", 1): "NM"}
    other = {("a", 0): "VM", ("a", 1): "BM", ("b", 0): "VM", ("b", 1): "NM", ("c", 0): "NM", ("c", 1): REJECTED}
    found = compare_labels(plain, other)
    assert (found["generations"], found["equal"], found["memorised"]) == (6, 2, 3)
    assert (found["lost"], found["gained"]) == (1, 1)
    assert found["changes"] == {"VM to BM": 1, "NM to VM": 1, "FM to NM": 1, "NM to rejected": 1}
    assert found["rate"] == pytest.approx(1 / 3)
    assert 0 < found["low"] < found["rate"] < found["high"] < 1


def test_equal_verdicts_have_an_interval_all_the_same() -> None:
    plain = {(f"p{at}", sample): "NM" for at in range(100) for sample in range(3)}
    found = compare_labels(plain, plain)
    assert (found["rate"], found["high"], found["changes"]) == (1.0, 1.0, {})
    assert 0.95 < found["low"] < 0.99  # of 100 prompts, not of 300 independent draws


def test_other_generations_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different generations"):
        compare_labels({("a", 0): "NM"}, {("a", 1): "NM"})


def test_modes_are_ways_that_a_census_may_be_configured_to() -> None:
    from memscan.config import GeneratorConfig, ResourcesConfig

    for mode in MODES.values():
        GeneratorConfig(path="g", **mode.generator)
        ResourcesConfig(**mode.resources)
        assert mode.generator.get("scheduler", SUPPORTED[0]) in SUPPORTED
    assert {name for name, mode in MODES.items() if mode.lossy} == {"solver", "late-guidance", "cached"}


def test_a_run_is_sampled_again(complete_run: Path) -> None:
    """Shared branches change no verdict; the lossy ways are compared on the same generations, and the table has all."""
    said: list[str] = []
    names = ["fast", "late-guidance"]
    document = measure_agreement(str(complete_run), names, overrides=["generator.steps=3"], progress=said.append)
    prompts = document["prompts"]
    assert prompts >= len(ORDINARY)
    assert document["steps"] == 3
    fast, late = (document["modes"][name] for name in names)
    assert (fast["rate"], fast["changes"]) == (1.0, {})
    assert fast["generations"] == late["generations"] == prompts * SAMPLES
    assert late["equal"] + sum(late["changes"].values()) == late["generations"]
    assert len(said) == 3
    table = agreement_table(document)
    assert all(f"| {name} |" in table for name in names)


def test_the_command(complete_run: Path) -> None:
    run = CliRunner().invoke(
        app, ["evaluate", "sampling", str(complete_run), "--mode", "fast", "--prompts", "3", "--json"]
    )
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["prompts"] == 3
    assert document["modes"]["fast"]["generations"] == 3 * SAMPLES
    wrong = CliRunner().invoke(app, ["evaluate", "sampling", str(complete_run), "--mode", "faster"])
    assert wrong.exit_code != 0
    assert "no mode 'faster'" in wrong.output


def test_a_run_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        measure_agreement(str(tmp_path), ["fast"])
