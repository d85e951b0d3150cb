"""The screen as the first stage of a scan: rows conserve, steps are not computed twice, and what it costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from memscan.config import CensusConfig
from memscan.errors import ConfigError, ModelError
from memscan.models.calls import CallCounter
from memscan.models.generator import Generator
from memscan.worker.prompt import Prompt
from memscan.worker.screen import Screen
from pipelines.evaluate.screen import threshold_of_run
from pipelines.ray.stage import StageSetup
from pipelines.reduce.job import reduce_run
from pipelines.run_folder.runs import Run
from pipelines.scan.job import scan
from pipelines.scan.stages import Census, Judge, Sample
from tests.support.tiny_world import MEMORISED, ORDINARY, SAMPLES, TinyWorld


def ids(table: Any) -> list[str]:
    return table["prompt_id"].to_pylist()


@pytest.fixture
def screened(plan: StageSetup) -> Any:
    """The plan with a screen over it."""

    def make(**values: object) -> StageSetup:
        rule = {"threshold": 0.0, "seeds": 2, "audit_share": 0.3, **values}
        data = {**plan.config.model_dump(mode="json"), "screen": rule}
        return dataclasses.replace(plan, config=CensusConfig.model_validate(data))

    return make


def test_every_row_comes_out_and_passed_ones_have_no_generations(screened: Any, prompts: Any) -> None:
    stage = Census(screened(threshold=1e9))
    rows = stage(prompts).to_pylist()
    assert [row["prompt_id"] for row in rows] == ids(prompts)
    done = [row for row in rows if row["status"] == "done"]
    assert {row["decision"] for row in done} <= {"audit", "pass"}
    for row in rows:
        if row["status"] == "rejected":
            assert (row["decision"], row["weight"], row["generations"]) == (None, None, [])
        else:
            assert (len(row["generations"]) == SAMPLES) == (row["decision"] == "audit")
            assert row["weight"] == (pytest.approx(1 / 0.3) if row["decision"] == "audit" else None)
            assert row["screen_score"] > 0


def test_both_ways_of_judging_give_the_same_rows(screened: Any, prompts: Any) -> None:
    plan = screened(threshold=0.0)
    whole = Census(plan)(prompts)
    apart = Judge(plan)(Sample(plan)(prompts))
    assert whole.select(["decision", "screen_score", "weight"]) == apart.select(["decision", "screen_score", "weight"])
    labels = [[[g["label"] for g in row] for row in table["generations"].to_pylist()] for table in (whole, apart)]
    assert labels[0] == labels[1]


def test_the_step_that_was_screened_is_not_computed_again(screened: Any) -> None:
    stage = Census(screened(threshold=0.0))
    sampler = stage.work[0]
    steps = sampler.generator.config.steps
    prompts = [Prompt("a" * 16, MEMORISED[0]), Prompt("b" * 16, ORDINARY[0])]
    with CallCounter(sampler.generator.checkpoint.unet) as counter:
        chosen = sampler.screen(prompts)
    assert counter.calls == 2 * 2 + 2  # two prompts, two seeds, and the empty caption once a seed
    with CallCounter(sampler.generator.checkpoint.unet) as counter:
        sampler.draft(chosen)
    assert counter.calls == 2 * SAMPLES * 2 * (steps - 1)


def test_adaptive_samples_go_on_where_something_is_memorised(
    screened: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Census(screened(threshold=0.0, first_samples=1))
    classifier = stage.work[1]
    record = classifier.record

    def judged(generated: Any, hits: Any) -> dict[str, Any]:
        row = record(generated, hits)
        return {**row, "label": "VM" if row["seed"] % 2 == 0 else "NM"}

    monkeypatch.setattr(classifier, "record", judged)
    monkeypatch.setattr(stage.work[0], "_seed", lambda prompt, sample: int(prompt.prompt_id, 16) % 1000 + 2 * sample)
    rows = [row for row in stage(prompts).to_pylist() if row["status"] == "done"]
    assert {len(row["generations"]) for row in rows} == {1, SAMPLES}
    for row in rows:
        assert [g["sample"] for g in row["generations"]] == list(range(len(row["generations"])))
        assert (row["generations"][0]["label"] == "VM") == (len(row["generations"]) == SAMPLES)


def test_a_detector_that_does_not_apply_is_refused(screened: Any, tiny_world: TinyWorld) -> None:
    config = screened().config
    generator = Generator.load(config.generator.model_copy(update={"guidance": 1.0}))
    with pytest.raises(ModelError, match=r"noise_norm does not apply.*unconditional"):
        Screen(config.screen, generator)
    Screen(config.screen.model_copy(update={"detector": "one_step_dcs"}), generator)


def test_what_does_not_fit_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        tiny_world.config(tmp_path, screen__seeds=2)
    with pytest.raises(ConfigError, match=r"did you mean .audit_s"):
        tiny_world.config(tmp_path, screen__threshold=2, screen__audit=0.1)
    with pytest.raises(ConfigError, match=r"more than generator\.samples"):
        tiny_world.config(tmp_path, screen__threshold=1, screen__first_samples=9)
    plain = tiny_world.config(tmp_path)
    assert "screen" not in plain.content()
    assert tiny_world.config(tmp_path, screen__threshold=1).fingerprint() != plain.fingerprint()


def test_a_screened_run_adds_up_and_estimates_what_it_passed(
    tiny_world: TinyWorld, reduced_run: Path, in_process: None, tmp_path: Path
) -> None:
    full, cut = reduced_run, tmp_path / "cut"
    rule = tiny_world.config(cut, screen__threshold=0.0, screen__seeds=2).screen
    assert rule is not None
    found = threshold_of_run(str(full), rule, target=0.99)
    assert found.memorised == len(MEMORISED)
    assert not found.reached  # two prompts cannot show it
    config = tiny_world.config(cut, screen__threshold=1e9, screen__seeds=2, screen__audit_share=0.5)
    scan(config)
    assert Run.load(str(cut)).state == "complete"
    census = reduce_run(str(cut))
    screen, counts = census["screen"], census["counts"]
    assert sum(screen["decisions"].values()) == counts["done"] == len(MEMORISED) + len(ORDINARY)
    assert counts["generations"] == SAMPLES * screen["decisions"]["audit"]
    missed = screen["missed"]
    assert missed["low"] <= missed["count"] <= missed["high"]
    assert missed["of"] == screen["decisions"]["pass"]
    memorised = census["prompts"]["memorised"]
    assert memorised["low"] <= memorised["rate"] <= memorised["high"] <= 1
    assert (tmp_path / "cut" / "report.html").is_file()
