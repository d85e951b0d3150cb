"""The stages without Ray, on the tiny world: both forms of the chain agree; bad rows come out with their reasons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from memscan.errors import IntegrityError, ModelError, Reason
from memscan.records import CENSUS
from pipelines.ray.stage import StageSetup
from pipelines.run_folder.inputs import model_ids, pinned
from pipelines.scan.stages import SAMPLED, Census, Judge, Sample


@pytest.fixture(scope="module")
def census(plan: StageSetup) -> Census:
    return Census(plan)


def failing(work: Any, bad: str) -> Any:
    """`work` on captions, raising where one holds `bad`."""

    def generate(captions: list[str], seeds: list[int], first: Any = None) -> Any:
        if any(bad in caption for caption in captions):
            raise RuntimeError("out of luck")
        return work(captions, seeds)

    return generate


def test_memorised_captions_are_found_with_their_images(census: Census, prompts: pa.Table) -> None:
    rows = census(prompts).to_pylist()
    for row in rows:
        if row["status"] == "done":
            memorised = row["caption"].startswith("a red")
            labels = {generation["label"] for generation in row["generations"]}
            assert labels == ({"VM"} if memorised else {"NM"})
            for generation in row["generations"]:
                best = generation["candidates"][0]
                assert best["reference_id"] == generation["match_id"]
                assert (generation["evidence"] is not None) == memorised
                if memorised:
                    assert generation["match_id"] == f"copy-{row['caption'][:5]}-{generation['sample']}"
                    assert generation["similarity"] == pytest.approx(1, abs=1e-3)
                    assert best["found_by"] == "whole+foreground+background"


def test_two_stages_equal_one(plan: StageSetup, census: Census, prompts: pa.Table) -> None:
    sampled = Sample(plan)(prompts)
    assert sampled.schema == SAMPLED
    split, fused = Judge(plan)(sampled), census(prompts)
    assert split.schema == fused.schema == CENSUS
    assert split.equals(fused)


def test_rows_rejected_at_reading_pass_untouched(census: Census, prompts: pa.Table) -> None:
    before = [row for row in prompts.to_pylist() if row["status"] == "rejected"]
    after = [row for row in census(prompts).to_pylist() if row["status"] == "rejected"]
    assert len(before) == 3
    unscreened = {"decision": None, "screen_score": None, "weight": None}
    assert after == [{**row, "generations": [], **unscreened} for row in before]


def test_a_row_that_raises_is_rejected_and_its_neighbours_live(
    census: Census, prompts: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = census.work[0].generator
    monkeypatch.setattr(generator, "generate", failing(generator.generate, "number 3"))
    rows = census(prompts).to_pylist()
    bad = [row for row in rows if row["reason"] == Reason.GENERATION_FAILED.value]
    assert [row["caption"] for row in bad] == ["an ordinary caption number 3"]
    assert "out of luck" in bad[0]["message"]
    assert sum(row["status"] == "done" for row in rows) == 2


def test_images_that_are_not_finite_are_rejects(
    census: Census, prompts: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    generator = census.work[0].generator
    work = generator.generate

    def generate(captions: list[str], seeds: list[int], first: Any = None) -> Any:
        made = work(captions, seeds)
        finite = np.array(["number 5" not in caption for caption in captions])
        return dataclasses.replace(made, finite_B=finite)

    monkeypatch.setattr(generator, "generate", generate)
    bad = [row for row in census(prompts).to_pylist() if row["reason"] == "generation_not_finite"]
    assert [row["caption"] for row in bad] == ["an ordinary caption number 5"]


def test_a_missing_reference_is_a_reject_and_not_a_miss(
    census: Census, prompts: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memscan.errors import RowReject

    classifier = census.work[1]
    classifier.detector.forget()
    work = classifier.index.fetch

    def fetch(row: int) -> Any:
        reference = work(row)
        if reference.reference_id == "copy-a red-0":
            raise RowReject(Reason.REFERENCE_MISSING, "no image")
        return reference

    monkeypatch.setattr(classifier.index, "fetch", fetch)
    for row in census(prompts).to_pylist():
        candidates = {each["reference_id"] for made in row["generations"] for each in made["candidates"]}
        assert "copy-a red-0" not in candidates
        if row["caption"].startswith("a red"):
            assert row["reason"] == "reference_missing"


def test_a_stage_that_cannot_load_says_so_when_called(plan: StageSetup, tmp_path: Path, prompts: pa.Table) -> None:
    config = plan.config.model_copy(
        update={"generator": plan.config.generator.model_copy(update={"path": str(tmp_path / "nothing")})}
    )
    stage = Sample(StageSetup(config, "cpu", 1))
    with pytest.raises(ModelError, match="no such model folder"):
        stage(prompts)


@pytest.mark.parametrize("role", ["generator", "segmenter", "embedder"])
def test_a_worker_refuses_models_that_the_run_did_not_begin_with(
    plan: StageSetup, prompts: pa.Table, role: str
) -> None:
    """Before it loads them: folders by their hash, files by the hash that the driver put into the plan."""
    known = model_ids(plan.config)
    pinned_plan = replace(plan, config=pinned(plan.config, known), models=known)
    assert pinned_plan.config.segmenter.sha256
    pinned_plan.begin("generator", "segmenter", "embedder")
    if role == "generator":
        other = replace(pinned_plan, models={**known, role: f"{known[role][:-12]}{'0' * 12}"})
    else:
        section = getattr(pinned_plan.config, role).model_copy(update={"sha256": "0" * 64})
        other = replace(pinned_plan, config=pinned_plan.config.model_copy(update={role: section}))
    with pytest.raises(IntegrityError):
        Sample(other)(prompts)
    with pytest.raises(IntegrityError, match="the run began with"):
        pinned(plan.config, {**known, role: "another@000000000000"})


def test_progress_is_reported(plan: StageSetup, prompts: pa.Table) -> None:
    seen: list[tuple[str, int, dict[str, int]]] = []
    stage = Census(plan, lambda name, rows, notes: seen.append((name, rows, dict(notes))))
    assert seen == [("sample", 0, {}), ("judge", 0, {})]
    stage(prompts)
    assert seen[2:] == [
        ("sample", 6, {}),
        ("judge", 6, {"VM": 2, "caption_empty": 1, "caption_too_long": 1, "caption_not_utf8": 1}),
    ]
