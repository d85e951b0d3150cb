"""Three checkpoints of the planted world through a nightly: trend, exit codes, JUnit; a second call does nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from memscan.index.change import remove
from memscan.planted.world import read_truth
from pipelines.cli import app
from pipelines.run_folder.runs import Run
from tests.pipelines.nightly.conftest import write_watch

POLICY = {"max_vm_rate": 0.2, "max_new_flagged": 3, "max_severity": 2.0}
SECRET = "hook-9f31-secret"


@pytest.fixture
def hook() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A server on this machine that keeps what is posted to it."""
    got: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.headers["Authorization"], json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/services/{SECRET}", got
    server.shutdown()


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_three_checkpoints_of_the_planted_world(
    checkpoints: Path, panel: dict[str, Any], in_process: None, tmp_path: Path, monkeypatch: Any, hook: Any
) -> None:
    url, posted = hook
    monkeypatch.setenv("HOOK", url)
    monkeypatch.setenv("HOOK_TOKEN", "token-7712-secret")
    source, out = tmp_path / "checkpoints", tmp_path / "registry"
    source.mkdir()
    shutil.copytree(checkpoints / "step-900", source / "step-900")
    watch = write_watch(
        tmp_path / "watch.yaml",
        panel,
        str(out),
        str(source),
        policy=POLICY,
        baseline="step-900",
        webhook={"url_env": "HOOK", "token_env": "HOOK_TOKEN"},
    )

    def call(*options: str) -> Any:
        result = CliRunner().invoke(app, ["nightly", str(watch), *options])
        assert "Traceback" not in result.output
        return result

    # The first night: one early checkpoint, that copies nothing. There is nothing to compare it with.
    first = call()
    assert first.exit_code == 0, first.output
    assert "passed        step-900" in first.stdout

    # Somebody takes every planted reference out of the index: the registry keeps to the version that it began with.
    planted = [key for row in read_truth().to_pylist() if row["label"] == "VM" for key in row["reference_ids"]]
    held = set(pq.read_table(panel["index"]["source"], columns=["reference_id"])["reference_id"].to_pylist())
    assert remove(str(out / "index"), sorted(held & set(planted))).version == 2

    # The second: one that memorises, the mitigated one, and one that is not whole.
    for name in ("step-1000", "step-1000-mitigated"):
        shutil.copytree(checkpoints / name, source / name)
    broken = shutil.copytree(checkpoints / "step-1000", source / "step-1001")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    second = call("--junit", str(tmp_path / "ci" / "junit.xml"))
    assert second.exit_code == 4, second.output  # not scanned outranks a policy
    assert "FAILED        step-1000 " in second.stdout
    assert "passed        step-1000-mitigated" in second.stdout
    assert "not scanned   step-1001" in second.stdout

    assert {Run.load(str(run)).manifest["index"]["version"] for run in (out / "runs").iterdir()} == {1}
    records = {row["name"]: row for row in pq.read_table(out / "history.parquet").to_pylist()}
    assert [*records] == ["step-900", "step-1000", "step-1000-mitigated"]
    rates = [row["vm_rate"] for row in records.values()]
    assert rates[0] == 0.0
    assert rates[1] >= 0.4  # half of the panel is planted
    assert rates[2] < POLICY["max_vm_rate"]
    assert records["step-1000"]["new"] >= 4
    assert records["step-1000-mitigated"]["gone"] >= 1  # objects go; some backgrounds stay
    assert len((out / "history.csv").read_text().splitlines()) == 4
    page = (out / "trend.html").read_text()
    for name in records:
        assert f"<bdi>{name}</bdi></a>" in page
    assert (out / "runs").is_dir()
    assert len(list((out / "runs").glob("*/report.html"))) == 3

    suites = {suite.get("name"): suite for suite in ElementTree.parse(tmp_path / "ci" / "junit.xml").getroot()}
    assert [*suites] == ["step-1000", "step-1000-mitigated", "step-1001"]
    failed = {case.get("name") for case in suites["step-1000"] if case.find("failure") is not None}
    # Previous and baseline are one checkpoint here, and both are asked.
    assert failed == {"max_vm_rate", "max_new_flagged against step-900"}
    assert suites["step-1001"].get("errors") == "1"
    assert (out / "junit.xml").read_bytes() == (tmp_path / "ci" / "junit.xml").read_bytes()

    assert [body["state"] for _, body in posted] == ["passed", "error"]
    assert posted[0][0] == "Bearer token-7712-secret"

    # The third: the broken one is gone, nothing is new, nothing is touched.
    shutil.rmtree(broken)
    before = files(out)
    third = call()
    assert third.exit_code == 0
    assert "nothing new   3 checkpoints scanned before" in third.stdout
    assert files(out) == before
    assert len(posted) == 2
    standing = call("--standing", "--json")
    assert (standing.exit_code, json.loads(standing.stdout)["state"]) == (0, "passed")

    # The same files with other times, and the same weights under another name, are known.
    for file in (source / "step-900").rglob("*.json"):
        os.utime(file)
    shutil.copytree(source / "step-1000-mitigated", source / "step-2000")
    again = call("--json")
    twins = json.loads(again.stdout)["checkpoints"]
    assert [(row["name"], row["same_as"]) for row in twins] == [
        ("step-900", "step-900"),
        ("step-2000", "step-1000-mitigated"),
    ]
    assert len(list((out / "runs").iterdir())) == 3

    # Another panel is another registry.
    write_watch(watch, {**panel, "verdict": {"min_share": 1.0}}, str(out), str(source))
    shutil.copytree(checkpoints / "step-900", source / "step-3000")
    other = call()
    assert other.exit_code == 2
    assert "the panel changed since the first checkpoint (verdict: " in other.stderr

    for path in out.rglob("*"):  # no secret reached a file
        if path.is_file():
            data = path.read_bytes()
            assert SECRET.encode() not in data, path
            assert b"7712-secret" not in data, path
    for result in (first, second, third, again):
        assert SECRET not in result.output
