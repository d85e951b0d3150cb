"""A census that is complete and hollow: exit code 3, and the last line says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import typer

from memscan.errors import RejectedError
from pipelines.commands.census import _refuse_hollow
from pipelines.commands.shared import guarded
from pipelines.run_folder.tables import Counts


def counts(done: int, rejected: int) -> Counts:
    rows = done + rejected
    return Counts(rows, rows, done, rejected, done, {}, {"caption_empty": 1, "generation_failed": rejected - 1})


def configured(share: float) -> Any:
    return SimpleNamespace(out="runs/x", resources=SimpleNamespace(max_reject_share=share))


@pytest.mark.parametrize(
    ("done", "rejected", "share", "hollow"),
    [
        (0, 5, 0.5, True),
        (0, 5, 1.0, True),
        (4, 6, 0.5, True),
        (5, 5, 0.5, False),
        (9, 1, 0.0, True),
        (9, 0, 0.0, False),
    ],
)
def test_most_rows_rejected_is_exit_code_3(
    done: int, rejected: int, share: float, hollow: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not hollow:
        _refuse_hollow(counts(done, rejected), configured(share))
        return
    with pytest.raises(typer.Exit) as caught, guarded():
        _refuse_hollow(counts(done, rejected), configured(share))
    assert caught.value.exit_code == RejectedError.exit_code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{rejected} of {done + rejected} prompts were rejected, most as" in line
    assert ("all of them" in line) == (done == 0)


def test_every_exit_code_stands_in_one_table() -> None:
    """The codes that the code has, and that the page on operations explains; no other page has a table of its own."""
    import re
    import signal
    from pathlib import Path

    from memscan.errors import MemscanError
    from pipelines.commands import census, mitigate, nightly

    docs = Path(__file__).resolve().parents[3] / "docs"
    tables = [page.name for page in docs.glob("*.md") if "| exit code |" in page.read_text(encoding="utf-8")]
    assert tables == ["operations.md"]
    text = (docs / "operations.md").read_text(encoding="utf-8").partition("| exit code |")[2].partition("\n\n")[0]
    told = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in row.split(",")}
    known = {0, 1, MemscanError.exit_code, RejectedError.exit_code, census.ROWS_FAILED}
    known |= {nightly.POLICY_FAILED, nightly.NOT_SCANNED, mitigate.POLICY_FAILED}
    known |= {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    assert told == known
    assert "SIGTERM" in text
