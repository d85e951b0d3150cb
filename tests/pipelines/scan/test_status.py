"""What `memscan status` says while somebody works on a run, when nobody does any more, and from another machine."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memscan.io import storage
from pipelines.cli import app
from pipelines.ray.progress import ProgressBar, ProgressDisplay, Seen
from pipelines.run_folder.lease import hold
from pipelines.run_folder.runs import Run
from pipelines.scan.status import describe, run_status


@pytest.fixture
def running(complete_run: Path, tmp_path: Path) -> Run:
    """Two of three parts are committed, and the run is not said to be complete."""
    shutil.copytree(complete_run, tmp_path / "run")
    run = Run.load(str(tmp_path / "run"))
    run.reopen({2: run.committed_files(2)})
    run.stop("running")
    return run


def show_progress(run: Run, judged: int) -> None:
    seen = {"sample": Seen(15, 5.0, {}, 1), "judge": Seen(judged, 5.0, {"VM": 4, "caption_empty": 1}, 1)}
    logs = Path(run.folder.path) / "logs"
    display = ProgressDisplay(lambda: seen, (logs / "lines").open("w"), logs / "progress.json", line_seconds=0.01)
    with display.show(ProgressBar("sample", "prompts", 15), ProgressBar("judge", "prompts", 15)):
        pass


def test_while_a_driver_works(running: Run) -> None:
    with hold(running.folder.leases):
        show_progress(running, judged=13)
        status = run_status(running.folder.path)
        shown = CliRunner().invoke(app, ["status", running.folder.path]).stdout
        told = json.loads(CliRunner().invoke(app, ["status", running.folder.path, "--json"]).stdout)
    assert (status["state"], status["parts"]) == ("running", {"committed": 2, "total": 3})
    assert status["queue"] == {"sample": 0, "judge": 2, "commit": 1}
    stages = {stage["stage"]: stage for stage in status["stages"]}
    assert (stages["judge"]["rate"], stages["judge"]["unit"]) == (13 / 5, "prompts")
    assert told["holder"]["pid"] == status["holder"]["pid"] > 0
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "heard of" in lines["working"]
    assert "13/15 prompts  2.6/s  1 s left  VM 4  caption_empty 1" in lines["judge"]
    assert lines["waiting"].split(maxsplit=1)[1] == "sample 0   judge 2   commit 1"
    assert "resume" not in lines


def test_when_the_driver_is_gone(running: Run) -> None:
    with hold(running.folder.leases):
        show_progress(running, judged=13)
    status = run_status(running.folder.path)
    assert (status["state"], status["stages"], status["holder"]) == ("stopped", None, None)
    assert "run the same scan command again" in describe(status)


def test_from_another_machine_the_commits_tell_the_pace(running: Run) -> None:
    """No figures of the stages there, but the lease is renewed."""
    (Path(running.folder.path) / "logs" / "progress.json").unlink()
    began = datetime.now(UTC)
    for number in (0, 1):
        path = running.folder.commit_record(number)
        when = began + timedelta(seconds=3 * number)
        storage.write_json(path, {**storage.read_json(path), "committed": when.isoformat()})
    with hold(running.folder.leases):
        status = run_status(running.folder.path)
    assert status["state"] == "running"
    assert status["pace"] == {"rate": 2.0, "left": 1.5}
    assert "2/s  2 s left (by the last commits)" in describe(status)


def test_afterwards(complete_run: Path) -> None:
    status = run_status(str(complete_run))
    counts: dict[str, Any] = Run.load(str(complete_run)).progress().to_json()
    assert (status["state"], status["counts"], status["queue"], status["pace"]) == ("complete", counts, None, None)
    for reason, count in counts["reasons"].items():
        assert f"{reason} {count}" in describe(status)


def test_old_figures_are_those_of_a_driver_that_is_gone(running: Run) -> None:
    with hold(running.folder.leases):
        show_progress(running, judged=13)
        path = Path(running.folder.path) / "logs" / "progress.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "time": time.time() - 3600}))
        assert run_status(running.folder.path)["stages"] is None
