"""`memscan submit` against a job server that speaks Ray's REST API, on loopback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask import Flask, jsonify, request
from typer.testing import CliRunner
from werkzeug.serving import make_server

from pipelines.cli import app

pytestmark = pytest.mark.waits

ROOT = str(Path(__file__).resolve().parents[3])


class JobServer:
    """What Ray's job server does with a submission, as far as a client can see it; a job ends at its second look."""

    def __init__(self, outcome: str) -> None:
        self.outcome, self.submitted, self.packages, self.looks = outcome, [], {}, 0
        self.token: str | None = None  # that it asks for
        web = Flask("jobs")

        @web.before_request
        def allowed() -> Any:
            shown = request.headers.get("Authorization")
            return None if self.token is None or shown == f"Bearer {self.token}" else ("who are you?", 401)

        @web.get("/api/version")
        def version() -> Any:
            import ray

            return jsonify(version="4", ray_version=ray.__version__, ray_commit="x", session_name="s")

        @web.route("/api/packages/<protocol>/<name>", methods=["GET", "PUT"])
        def package(protocol: str, name: str) -> Any:
            if request.method == "PUT":
                self.packages[name] = request.get_data()
                return jsonify({})
            return jsonify({}) if name in self.packages else (jsonify({}), 404)

        @web.post("/api/jobs/")
        def jobs() -> Any:
            self.submitted.append(request.get_json())
            return jsonify(job_id="raysubmit_1", submission_id="raysubmit_1")

        @web.get("/api/jobs/raysubmit_1")
        def job() -> Any:
            self.looks += 1
            status = self.outcome if self.looks > 1 else "RUNNING"
            return jsonify(type="SUBMISSION", entrypoint="x", status=status, submission_id="raysubmit_1")

        @web.get("/api/jobs/raysubmit_1/logs")
        def logs() -> Any:
            return jsonify(logs="sample 1/2\nsample 2/2\n"[: 11 * self.looks])

        self.server = make_server("127.0.0.1", 0, web)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    monkeypatch.setattr("pipelines.scan.submit.POLL_SECONDS", 0.01)
    found = JobServer(request.param)
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's token would be put into the environment of all tests that come after."""
    monkeypatch.setattr("pipelines.scan.submit.TOKEN_FILE", tmp_path / "none")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["submit", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def census(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    settings = {
        "out": "s3://bucket/runs/a",
        "prompts": {"paths": ["s3://bucket/prompts.parquet"]},
        "generator": {"path": "/models/sd"},
        "segmenter": {"path": "/models/s.onnx"},
        "embedder": {"path": "/models/e.pt", "sha256": "0" * 64},
        "index": {"path": "s3://bucket/index"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(("server", "code"), [("SUCCEEDED", 0), ("FAILED", 1)], indirect=["server"])
def test_the_configuration_travels_and_the_output_comes_back(server: JobServer, code: int, census: Path) -> None:
    got, out, err = run(str(census), "--set", "name=a-1", "--address", server.address)
    assert got == code
    assert "raysubmit_1" in out
    assert err.count("sample 1/2") == err.count("sample 2/2") == 1
    assert "generator.path, segmenter.path, embedder.path" in err
    job = server.submitted[0]
    assert job["entrypoint"] == "memscan scan census.yaml --set name=a-1"
    assert job["runtime_env"]["working_dir"].startswith("gcs://")
    with zipfile.ZipFile(io.BytesIO(next(iter(server.packages.values())))) as package:
        assert package.namelist() == ["census.yaml"]
        assert package.read("census.yaml").decode() == census.read_text()


@pytest.mark.parametrize("server", ["RUNNING"], indirect=True)
def test_without_waiting_the_job_is_left_alone(server: JobServer, census: Path) -> None:
    code, out, _ = run(str(census), "--no-wait", "--address", server.address)
    assert (code, server.looks) == (0, 0)
    assert "ray job logs" in out


@pytest.mark.parametrize("server", ["SUCCEEDED"], indirect=True)
def test_a_cluster_that_asks_for_a_token(server: JobServer, census: Path, tmp_path: Path) -> None:
    """By the command in a process of its own: Ray looks for tokens when it is imported."""
    server.token = "t" * 32
    command = [sys.executable, "-m", "pipelines.cli", "submit", str(census), "--address", server.address]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    for told, code in (({}, 2), ({"RAY_AUTH_TOKEN": "x" * 32}, 2), ({"RAY_AUTH_TOKEN": server.token}, 0)):
        home = environment | {"HOME": str(tmp_path), "PYTHONPATH": ROOT} | told
        done = subprocess.run(command, env=home, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert ("RAY_AUTH_TOKEN" in done.stderr.splitlines()[-1]) == (code == 2)
        assert "Traceback" not in done.stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(server.token)
    home = environment | {"HOME": str(tmp_path), "PYTHONPATH": ROOT}
    assert subprocess.run(command, env=home, capture_output=True, check=False).returncode == 0
    assert len(server.submitted) == 2


def test_mistakes_are_one_line(census: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((str(census), "--address", "http://127.0.0.1:9"), "no Ray job server answers"),
        ((str(tmp_path / "none.yaml"),), "none.yaml"),
        (("--world", str(tmp_path)), "is not sent"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err
