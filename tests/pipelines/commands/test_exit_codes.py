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
