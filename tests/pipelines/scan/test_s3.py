"""A whole census whose every path is on S3, by the commands: it equals the one on a disk, and no secret is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.reduce.job import reduce_run
from tests.chaos.oracle import compare_rows, differences

ROOT = Path(__file__).resolve().parents[3]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "not-to-be-seen-0000000000000000000000001",
    "AWS_SESSION_TOKEN": "not-to-be-seen-2",
    "HF_TOKEN": "hf_not_to_be_seen_3",
    "MEMSCAN_WEBHOOK": "https://hooks.example/not-to-be-seen-4",
}


def on_s3(settings: dict[str, Any], bucket: str) -> dict[str, Any]:
    """The tiny world's configuration with every path in a bucket, named as its files are."""
    moved = json.loads(json.dumps(settings))
    for section, key in (("generator", "path"), ("segmenter", "path"), ("embedder", "path"), ("index", "source")):
        moved[section][key] = f"{bucket}/world/{Path(moved[section][key]).name}"
    moved["prompts"]["paths"] = [f"{bucket}/world/{Path(path).name}" for path in moved["prompts"]["paths"]]
    moved["index"]["path"] = f"{bucket}/index"
    return {**moved, "out": f"{bucket}/run", "part_size": 6}


def rows_of(run: Path) -> dict[int, dict[str, Any]]:
    """Census rows by their place in the prompt file, whose own path is left out: rejected rows are named by it too."""
    rows = pq.read_table(run / "census").to_pylist()
    for row in rows:
        row["source"] = row["source"].rpartition("/")[2]
        if row["status"] == "rejected":
            row["prompt_id"] = None
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["row"]: row for row in rows}


@pytest.mark.ray
@pytest.mark.slow
def test_every_path_on_s3(
    tiny_world: Any, complete_run: Path, s3: Any, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(str(tiny_world.folder) + "/", f"{s3_bucket}/world/", recursive=True)
    s3.pipe_file(f"{s3_bucket}/census.yaml", yaml.safe_dump(on_s3(tiny_world.settings, s3_bucket)).encode())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(scratch)
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    environment |= {"MEMSCAN_CACHE": str(tmp_path / "cache"), "RAY_TMPDIR": "/tmp"}  # names of its sockets are short

    command = [sys.executable, "-m", "pipelines.cli", "scan", f"{s3_bucket}/census.yaml"]
    scanned = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert scanned.returncode == 0, scanned.stderr[-2000:]
    told = scanned.stdout + scanned.stderr
    for chatter in ("raylet", "WARNING", "INFO", "DeprecationWarning", "core_worker"):
        assert chatter not in told
    for arguments in (["reduce", f"{s3_bucket}/run"], ["status", f"{s3_bucket}/run", "--json"]):
        done = CliRunner().invoke(app, arguments)  # needs no Ray at this size
        assert done.exit_code == 0, done.output
        told += done.output
    assert not [path for path in scratch.rglob("*") if path.suffix in (".parquet", ".html")], "not all is on S3"
    mine, theirs = tmp_path / "local", tmp_path / "s3"
    shutil.copytree(complete_run, mine / "run")
    shutil.copytree(complete_run / "index", mine / "index")
    reduce_run(str(mine / "run"))
    for name in ("run", "index"):
        s3.get(f"{s3_bucket}/{name}/", str(theirs / name) + "/", recursive=True)
    # An index says where its references were; all else is to be equal.
    (source,) = json.loads((mine / "index" / "manifest.json").read_text())["sources"]
    for file in (theirs / "index").rglob("*.json"):
        file.write_text(file.read_text().replace(f"{s3_bucket}/world/", source["root"]))
    assert not differences(mine, theirs, ("index", "reduce"))
    one, other = (rows_of(folder / "run") for folder in (mine, theirs))
    assert one.keys() == other.keys()
    assert not [told for number in one for told in compare_rows(one[number], other[number])]
    documents = [json.loads((folder / "run" / "run.json").read_text()) for folder in (mine, theirs)]
    assert documents[1]["state"] == "complete"
    assert documents[0]["counts"] == documents[1]["counts"]
    reports = [(folder / "run" / "report.html").read_text() for folder in (mine, theirs)]
    assert reports[0].count("data:image/") == reports[1].count("data:image/") > 0
    seen = [told.encode(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert not [secret for secret in SECRETS.values() if any(secret.encode() in one for one in seen)]
