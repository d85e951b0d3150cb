"""docs/tutorial.md is followed from its first block to its last; the notebook of examples/ is run from cell to cell."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app

pytestmark = pytest.mark.waits  # for a process that it started

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"^```(python|sh) step\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOTEBOOK = ROOT / "examples" / "census.ipynb"


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo's census over a few prompts and references; all else is as it is."""
    import memscan.planted.world as world

    whole = world.world_config

    def small(*arguments: Any, **named: Any) -> Any:
        config = whole(*arguments, **named)
        table = pq.read_table(config.index.source)
        pq.write_table(table.slice(0, 16), tmp_path / "references.parquet")
        return config.model_copy(
            update={
                "prompts": config.prompts.model_copy(update={"limit": 3}),
                "index": config.index.model_copy(update={"source": str(tmp_path / "references.parquet")}),
            }
        )

    monkeypatch.setattr(world, "world_config", small)


@pytest.mark.slow
def test_the_tutorial_can_be_followed(
    small_demo: None, in_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## \d\.", text, re.MULTILINE)) == 5
    ran = []
    for language, block in STEP.findall(text):
        if language == "python":
            exec(compile(block, "tutorial.md", "exec"), names)
            continue
        for line in block.splitlines():
            name, *arguments = shlex.split(line)
            assert name == "memscan"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran.append(arguments[0])
    assert ran[0] == "demo"
    assert ran[-3:] == ["scan", "reduce", "status"]
    assert (folder / "runs" / "rehearsal" / "report.html").is_file()
    assert json.loads((folder / "runs" / "rehearsal" / "census.json").read_text())["counts"]["rejected"] == 0
    assert (folder / "evidence" / "manifest.json").is_file()


def test_no_block_of_the_tutorial_is_left_out() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert len(STEP.findall(text)) == len(re.findall(r"^```\w", text, re.MULTILINE)) >= 8


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    cells = notebook["cells"]
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert cells[0]["cell_type"] == "markdown"
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "a notebook is kept without its outputs"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert [one.label for one in names["found"]] == ["VM", "VM", "VM"]
    assert names["verdict"].label == "VM"
    assert names["figure"].get_axes()
