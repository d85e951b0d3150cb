"""What README and docs show is true: blocks that say `run` are run, and what they print is what is printed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipelines.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(sorted(path for room in ("docs", "examples", "cluster") for path in (ROOT / room).glob("*.md"))),
]
BLOCK = re.compile(r"^```(\w+) (run|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# ```python run, ```sh run (memscan's own commands), and after one of them ```text output
RUNNABLE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_runnable_blocks_of(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = ""
    for language, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "output":
            assert printed == text
        elif language == "python":
            assert len(text.splitlines()) < 15, "a use is shown in fewer than 15 lines"
            heard = io.StringIO()
            with contextlib.redirect_stdout(heard):
                exec(compile(text, page.name, "exec"), names)
            printed = heard.getvalue()
        else:
            assert language == "sh"
            printed = "".join(command(line) for line in text.splitlines())


def command(line: str) -> str:
    """What a command of `memscan` prints."""
    name, *arguments = shlex.split(line, comments=True)
    assert name == "memscan"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_there_is_something_to_run() -> None:
    assert {"library.md"} <= {page.name for page in RUNNABLE}


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    """The longest fixed piece of each message in the table of operations.md is in the code."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("## When something is wrong")[2]
    sources = (path for room in ("memscan", "pipelines") for path in (ROOT / room).rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    messages = [
        one for row in re.findall(r"^\| (.*?`.*?) \|", table, re.MULTILINE) for one in re.findall(r"`(.+?)`", row)
    ]
    assert len(messages) > 15
    pieces = {one: max(re.split(r"\.\.\.|\bN\b|\bX@|'\w+'|[:()=]", one), key=len).strip(" ,") for one in messages}
    known = {"No space left on device", "index/rejects.parquet"}  # the system's words; a file
    assert not {one for one, piece in pieces.items() if piece not in code and piece not in known}


def test_commands_and_options_that_are_shown_exist() -> None:
    """In code and in blocks of the pages: `memscan COMMAND ... --option`."""
    top, shown, wrong = get_command(app), 0, []
    for page in PAGES:
        for line in re.findall(r"(?:`|^ {4})(memscan [a-z][^`\n#]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            words = line.replace("\\|", " ").split()[1:]
            command, depth = top, 0
            while words[depth:] and words[depth] in getattr(command, "commands", {}):
                command, depth = command.commands[words[depth]], depth + 1  # type: ignore[attr-defined]
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
            options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(words[depth:]))
            shown += depth > 0
            wrong += [f"{page.name}: {line}" for option in options if depth and option not in known]
    assert shown > 100
    assert not wrong


def test_every_command_is_in_the_table_of_operations() -> None:
    text = (
        (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Commands")[2].partition("\n## ")[0]
    )
    table = {
        words for line in re.findall(r"`memscan ([^`]*)`", text) for words in alternatives(line.replace("\\|", "|"))
    }
    group = get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        names = {f"{name} {one}" for one in below} if below else {name}
        assert not {one for one in names if not any(f"{words} ".startswith(f"{one} ") for words in table)}, name


def alternatives(line: str) -> list[str]:
    """Return `config init|schema X` as `config init X` and `config schema X`."""
    words = line.split()
    chosen = next((at for at, word in enumerate(words) if "|" in word and "[" not in word), None)
    if chosen is None:
        return [line]
    return [" ".join([*words[:chosen], one, *words[chosen + 1 :]]) for one in words[chosen].split("|")]


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            place = target.partition("#")[0]
            if "://" not in target and place and not (page.parent / place).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
