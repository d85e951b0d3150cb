"""The command line: what goes wrong is one clear line and an exit code, before anything heavy starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner, Result

import memscan
from memscan.models.checkpoint import PARTS
from memscan.prompts.table import read_prompts
from pipelines.cli import COMMANDS, app
from pipelines.run_folder.inputs import GENERATOR_PARTS

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The one line of a command that a user's mistake stops."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("memscan: ")
    assert "Traceback" not in result.output
    return line


@pytest.fixture
def census(tiny_world: Any, tmp_path: Path) -> Callable[..., str]:
    """Writes a configuration over the tiny world, with changes, and gives its path."""

    def write(**changes: object) -> str:
        path = tmp_path / "census.yaml"
        config = tiny_world.config(tmp_path / "run", **changes)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return str(path)

    return write


def test_help_is_quick() -> None:
    """No heavy module is imported before a command runs."""
    code = (
        "import sys, pipelines.cli; heavy = {'ray', 'torch', 'pyarrow', 'pandas', 'diffusers', 'transformers'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_driver_needs_no_torch() -> None:
    """Its import takes seconds, and the workers have their own."""
    code = "import sys, pipelines.scan.job, pipelines.index.job, pipelines.reduce.job; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_is_in_the_order_of_a_day() -> None:
    result = call("--help")
    assert result.exit_code == 0
    names = [name for panel in COMMANDS.values() for name in panel]
    assert names[:6] == ["demo", "scan", "status", "runs", "reduce", "report"]
    assert set(names) == set(get_command(app).commands)  # type: ignore[attr-defined]
    lines = [line.strip("│ ").partition(" ")[0] for line in result.output.splitlines() if line.startswith("│")]
    assert [line for line in lines if line in names] == names


def every_command(command: Any, path: str = "memscan") -> Iterator[tuple[str, Any]]:
    """A command and all below it."""
    yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from every_command(one, f"{path} {name}")


def test_every_command_and_option_is_explained_in_sentences() -> None:
    """As far as a program can tell: a text begins large, ends with a period, and has some words."""
    texts = {}
    for path, command in every_command(get_command(app)):
        texts[path] = command.help.partition("\n\n")[0]  # examples may follow
        texts |= {f"{path} {one.name}": getattr(one, "help", None) for one in command.params}
    assert len(texts) > 150
    bad = [path for path, text in texts.items() if not re.fullmatch(r"(?s)[A-Z]\S* \S.*[.]", (text or "").strip())]
    assert not bad


# Their answer is a document whatever is asked: JSON, or the page of the documentation.
DOCUMENTS = {"memscan planted score", "memscan config schema", "memscan config reference"}


def test_every_command_that_reports_does_so_as_json_too() -> None:
    leaves = {path: one for path, one in every_command(get_command(app)) if not getattr(one, "commands", None)}
    assert len(leaves) > 30
    without = {path for path, one in leaves.items() if "--json" not in {flag for p in one.params for flag in p.opts}}
    assert without == DOCUMENTS


def test_a_result_is_one_json_document(tmp_path: Path, in_process: None, tiny_world: Any) -> None:
    """Scan, reduce, report and the commands of an index: standard output parses whole, and says where things are."""
    path = tmp_path / "c.yaml"
    tiny_world.write_yaml(path, tmp_path / "run")
    index, run = str(tmp_path / "run" / "index"), str(tmp_path / "run")
    expected = {
        ("scan", str(path)): "fingerprint",
        ("reduce", run): "prompts",
        ("report", run): "report",
        ("retry", run): "tried_again",
        ("repair-run", run): "dropped",
        ("index", "verify", index): "files",
        ("index", "remove", index, "random-0"): "removed",
        ("index", "prune", index): "deleted",
    }
    for arguments, key in expected.items():
        result = call(*arguments, "--json")
        assert result.exit_code == 0, (arguments, result.output)
        assert key in json.loads(result.stdout), arguments


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"memscan {memscan.__version__}\n")


def test_completion_knows_the_commands() -> None:
    asked = {"_MEMSCAN_COMPLETE": "complete_bash", "COMP_WORDS": "memscan re", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="memscan", env=asked)
    assert set(result.stdout.split()) == {"reduce", "report", "retry", "repair-run"}


def test_missing_configuration(tmp_path: Path) -> None:
    assert "nothing.yaml" in refused("scan", str(tmp_path / "nothing.yaml"))
    assert "no configuration" in refused("scan")


def test_unknown_key_names_the_nearest(tiny_world: Any, tmp_path: Path) -> None:
    tiny_world.write_yaml(tmp_path / "c.yaml", tmp_path / "run")
    assert "did you mean 'steps'" in refused("scan", str(tmp_path / "c.yaml"), "--set", "generator.stepz=3")


def test_missing_prompt_file(census: Callable[..., str]) -> None:
    assert "nowhere.csv: no such file" in refused("scan", census(prompts__paths=["nowhere.csv"]))


def test_empty_prompt_file(census: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    assert "empty" in refused("scan", census(prompts__paths=[str(tmp_path / "empty.csv")]))


def test_wrong_caption_column(census: Callable[..., str], tmp_path: Path) -> None:
    assert "no_such_column" in refused("scan", census(prompts__caption_column="no_such_column"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"])
def test_model_folder_without_a_part(census: Callable[..., str], tiny_world: Any, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(tiny_world.folder / "checkpoint", tmp_path / "checkpoint")
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    line = refused("scan", census(generator__path=str(copy)))
    assert part in line
    assert str(copy) in line


def test_no_model_folder(census: Callable[..., str]) -> None:
    assert "no such model folder" in refused("scan", census(generator__path="some/where"))


@pytest.mark.parametrize("role", ["segmenter", "embedder"])
def test_wrong_hash(census: Callable[..., str], role: str) -> None:
    line = refused("scan", census(**{f"{role}__sha256": "0" * 64}))
    assert "expected 000" in line
    assert role in line


def test_torchscript_without_a_hash(census: Callable[..., str]) -> None:
    assert "sha256" in refused("scan", census(embedder__sha256=None))


def test_missing_references(census: Callable[..., str]) -> None:
    assert "nothing.parquet" in refused("scan", census(index__source="nothing.parquet"))


def test_index_that_is_not_there(census: Callable[..., str], tmp_path: Path) -> None:
    assert "no index here" in refused("scan", census(index__source=None, index__path=str(tmp_path / "index")))


def test_output_folder_of_something_else(census: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "photo.jpg").write_bytes(b"")
    assert "not empty and not a run" in refused("scan", census())


def test_output_folder_of_another_configuration(census: Callable[..., str], tiny_world: Any, tmp_path: Path) -> None:
    from pipelines.scan.job import open_run

    config = tiny_world.config(tmp_path / "run", generator__steps=7)
    open_run(config).write_prompts(read_prompts(config.prompts), part_size=5)
    assert "generator.steps: 7 -> 2" in refused("scan", census())


@pytest.mark.parametrize("command", ["reduce", "report", "status"])
def test_no_run(command: str, tmp_path: Path) -> None:
    assert "not a run folder" in refused(command, str(tmp_path))


def test_status_of_a_run_that_has_not_finished(tiny_world: Any, tmp_path: Path) -> None:
    from pipelines.scan.job import open_run

    open_run(tiny_world.config(tmp_path / "run"))
    found = json.loads(call("status", str(tmp_path / "run"), "--json").stdout)
    assert found["state"] == "stopped"
    assert "resume" in call("status", str(tmp_path / "run")).stdout


def test_doctor_finds_what_is_wrong(census: Callable[..., str]) -> None:
    good = call("doctor", census(), "--json")
    findings = {finding["name"]: finding for finding in json.loads(good.stdout)}
    assert findings["generator"]["state"] == "ok"
    assert findings["references"]["detail"].startswith("1 files")
    bad = call("doctor", census(segmenter__sha256="0" * 64))
    assert bad.exit_code == 1
    assert "PROBLEM  segmenter" in bad.stdout


def test_unexpected_failures_leave_a_traceback_in_the_logs(
    census: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pipelines.scan.job.read_prompts", broken)
    result = call("scan", census())
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "ZeroDivisionError: a bug" in result.stderr
    assert "Traceback" in (tmp_path / "run" / "logs" / "error.log").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def test_ctrl_c_says_how_to_resume(census: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.scan.job.read_prompts", interrupted)
    result = call("scan", census())
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "memscan: interrupted; run the same command to resume"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "interrupted"


def test_index_is_not_built_over_something(census: Callable[..., str], tiny_world: Any, tmp_path: Path) -> None:
    line = refused("index", "build", str(tiny_world.folder / "references.parquet"), str(tmp_path), "--config", census())
    assert "is there already" in line


def test_the_parts_that_are_looked_for_are_those_that_are_loaded() -> None:
    assert set(GENERATOR_PARTS) == set(PARTS)


def test_tiny_world_is_what_it_says(tiny_world: Any) -> None:
    assert pq.read_metadata(tiny_world.folder / "references.parquet").num_rows == 25


def test_a_configuration_is_laid_over_a_world(tiny_world: Any, tmp_path: Path) -> None:
    from pipelines.commands.shared import configuration

    world = tmp_path / "world"
    world.mkdir()
    (world / "manifest.json").write_text("{}")
    settings = {**tiny_world.settings, "prompts": {"paths": ["prompts.csv"], "max_chars": 99}}
    (world / "census.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"prompts": {"paths": ["mine.csv"]}, "out": "there"}))
    config = configuration(tmp_path / "mine.yaml", ["generator.steps=9"], str(world))
    assert config.prompts.paths == ["mine.csv"]
    assert config.prompts.max_chars == 99
    assert (config.out, config.generator.steps) == ("there", 9)
    assert configuration(None, None, str(world)).prompts.paths == [str(world / "prompts.csv")]


def test_no_world(tmp_path: Path) -> None:
    assert "no planted world here" in refused("scan", "--world", str(tmp_path))
