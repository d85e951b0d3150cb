"""Rejected rows tried again: what is taken out of a run, and that a kill in between loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memscan.errors import ConfigError, RunError
from memscan.records import CENSUS
from pipelines.run_folder.lease import hold
from pipelines.run_folder.parts import write_census
from pipelines.run_folder.runs import Run
from pipelines.scan.retry import retry


@pytest.fixture
def spoilt(complete_run: Path, in_process: None, tmp_path: Path) -> Path:
    """A complete run two of whose rows, in two parts, were rejected by a stage."""
    copy = shutil.copytree(complete_run, tmp_path / "run")
    manifest = json.loads((copy / "run.json").read_text())
    manifest["config"]["out"], manifest["index"]["path"] = str(copy), str(copy / "index")
    (copy / "run.json").write_text(json.dumps(manifest))
    run = Run.load(str(copy))
    with hold(run.folder.leases) as run.lease:
        kept = {}
        for number, reason in ((0, "worker_died"), (1, "generation_failed")):
            file = next(f for f in run.files(number) if "done" in pq.read_table(f)["status"].to_pylist())
            rows = pq.read_table(file).to_pylist()
            row = next(row for row in rows if row["status"] == "done")
            row.update(status="rejected", reason=reason, message="gone", generations=[])
            folder = run.folder.census_part(number)
            name = write_census(folder, pa.Table.from_pylist(rows, schema=CENSUS), run.epoch, run.fingerprint)
            kept[number] = [name, *(f.removeprefix(folder + "/") for f in run.files(number) if f != file)]
        run.reopen(kept)
        for number in kept:
            assert run.todo(number).num_rows == 0
            run.commit(number)
        run.finish()
    return copy


def _rows(out: Path) -> list[Any]:
    """Verdicts; scores differ in their last bit, because a row that is done alone is in another batch."""
    rows = pq.read_table(out / "census", schema=CENSUS).to_pylist()
    return sorted(
        (row["prompt_id"], row["status"], [(g["seed"], g["label"], g["match_id"]) for g in row["generations"]])
        for row in rows
    )


def test_rows_of_a_stage_are_done_and_rows_of_the_input_stay(spoilt: Path, complete_run: Path) -> None:
    before = Run.load(str(spoilt)).progress()
    assert before.reasons == Run.load(str(complete_run)).progress().reasons | {"worker_died": 1, "generation_failed": 1}  # type: ignore[operator]
    found = retry(str(spoilt))
    assert (found.rows, found.counts.done, found.counts.rejected) == (2, 12, 3)
    assert Run.load(str(spoilt)).state == "complete"
    assert _rows(spoilt) == _rows(complete_run)
    assert retry(str(spoilt)).rows == 0


def test_one_reason_only(spoilt: Path) -> None:
    found = retry(str(spoilt), ["worker_died"])
    assert found.rows == 1
    assert found.counts.reasons["generation_failed"] == 1  # type: ignore[index]


def test_a_kill_after_any_step_is_mended_by_a_scan(
    spoilt: Path, complete_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file that is written, and all after it, never happens."""
    calls = []

    def killed(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_census(*args)

    monkeypatch.setattr("pipelines.scan.retry.write_census", killed)
    with pytest.raises(KeyboardInterrupt):
        retry(str(spoilt))
    monkeypatch.undo()
    assert Run.load(str(spoilt)).state == "complete"  # nothing was changed yet (test_protocol.py kills at each step)
    found = retry(str(spoilt))
    assert found.counts.done == 12
    assert _rows(spoilt) == _rows(complete_run)


def test_mistakes_are_named(spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="caption_empty"):
        retry(str(spoilt), ["caption_empty"])
    with pytest.raises(RunError, match="not a run folder"):
        retry(str(tmp_path / "none"))
    manifest = json.loads((spoilt / "run.json").read_text())
    (spoilt / "run.json").write_text(json.dumps({**manifest, "state": "failed"}))
    with pytest.raises(RunError, match="not complete"):
        retry(str(spoilt))
