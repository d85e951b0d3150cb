"""What a person sees."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipelines.ray.progress import ProgressBar, ProgressCounts, ProgressDisplay, Seen, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1:00"), (185, "3:05"), (7800, "2:10:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_tally_times_a_stage_from_ready_to_last_batch() -> None:
    now = [100.0]
    tally = ProgressCounts(lambda: now[0])
    tally.add("sample", 0, {})
    now[0] = 104.0
    tally.add("sample", 8, {"VM": 2})
    now[0] = 108.0
    tally.add("sample", 8, {"VM": 1, "rejected": 1})
    now[0] = 300.0
    tally.add("sample", 0, {})  # a late worker
    assert tally.read() == {"sample": Seen(16, 8.0, {"VM": 3, "rejected": 1}, starts=2)}


def test_bar_counts_what_earlier_calls_did_but_not_into_its_rate() -> None:
    bar = ProgressBar("sample", "prompts", total=100, before=40)
    bar.update(Seen(20, 10.0, {}), now=50.0)
    assert bar.done == 60
    assert bar.rate == 2.0
    assert bar.left(now=50.0) == 20.0
    assert bar.left(now=55.0) == 15.0
    assert bar.text(now=50.0) == "sample  60/100 prompts (60 %)  2/s  20 s left"


def test_bar_never_exceeds_its_total() -> None:
    bar = ProgressBar("sample", "prompts", total=10)
    bar.update(Seen(14, 2.0, {}), now=1.0)  # a batch that was retried counts twice
    assert bar.done == 10
    assert bar.left(now=1.0) == 0.0


def test_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    seen = {"sample": Seen(5, 2.0, {"VM": 1})}
    display = ProgressDisplay(lambda: seen, out, tmp_path / "progress.json", line_seconds=0.01)
    with display.show(ProgressBar("sample", "prompts", 10), ProgressBar("judge", "prompts", 10)):
        pass
    last = out.getvalue().splitlines()[-1]
    assert "sample  5/10 prompts (50 %)  2.5/s" in last
    assert "VM 1" in last
    assert "judge   0/10 prompts (0 %)  loading models" in last
    stages = json.loads((tmp_path / "progress.json").read_text())["stages"]
    assert [(stage["stage"], stage["done"]) for stage in stages] == [("sample", 5), ("judge", 0)]


def test_terminal_has_a_bar_a_stage() -> None:
    out = Terminal()
    with ProgressDisplay(lambda: {"sample": Seen(10, 2.0, {})}, out).show(
        ProgressBar("sample", "prompts", 10), ProgressBar("judge", "prompts", 10)
    ):
        pass
    text = out.getvalue()
    assert "sample  10/10 prompts (100 %)" in text
    assert "judge   0/10" in text


def test_a_lost_tally_does_not_end_the_work() -> None:
    def lost() -> dict[str, Seen]:
        raise ConnectionError("the node of the tally is gone")

    out = io.StringIO()
    with ProgressDisplay(lost, out, line_seconds=0.01).show(ProgressBar("sample", "prompts", 10)):
        pass
    assert "sample  0/10" in out.getvalue()
