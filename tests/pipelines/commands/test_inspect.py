"""`memscan inspect`: one JSON object, or lines for a person; a mistake is one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from pipelines.cli import app


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["inspect", *arguments])
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("http://x.test/1\ta man\nhttp://x.test/2\ta man\nhttp://x.test/3\t\n")
    (tmp_path / "README.md").write_text("about")
    assert "prompts.header: false" in run(str(tmp_path), code=2)
    options = ["--set", "prompts.header=false", "--set", "prompts.caption_column=2", "--set", "prompts.url_column=1"]
    found = json.loads(run(str(tmp_path), "--json", *options))
    assert [found[key] for key in ("kind", "rows", "distinct")] == ["prompts", 3, 1]
    assert found["rejected"] == {"caption_empty": 1}
    assert (found["not_taken"], found["not_taken_count"]) == ([str(tmp_path / "README.md")], 1)
    assert found["examples"] == ["a man"]
    told = run(str(tmp_path), *options)
    assert "separated by tab" in told
    assert "README.md" in told


def test_references(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    for at in range(120):
        (tmp_path / f"{at}.dat").write_bytes(b"nothing")
    (tmp_path / "x.png").write_bytes(out.getvalue())
    (tmp_path / "y.jpg").write_bytes(b"")
    found = json.loads(run(str(tmp_path), "--json"))
    assert [found[key] for key in ("kind", "images", "rejected")] == ["references", 1, {"image_undecodable": 1}]
    assert (len(found["not_taken"]), found["not_taken_count"]) == (100, 120)
    assert "1 images of 2 rows" in run(str(tmp_path))
    assert "is about neither" in run(str(tmp_path), "--set", "generator.steps=3", code=2)
    assert "no such file" in run(str(tmp_path / "gone"), code=2)
