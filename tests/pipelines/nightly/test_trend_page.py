"""The trend page: what it says first, its limits and names, and the pages of changes that it links to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memscan.census.policy import PolicyConfig
from memscan.report.trend import HEIGHT, NAMED, chart, headline, render_trend
from pipelines.nightly.pairs import write_pairs
from pipelines.reduce.job import reduce_run
from tests.pipelines.nightly.test_figures import figures, record


def rule(name: str, limit: float, value: float | None, state: str, against: str = "") -> dict[str, Any]:
    message = f"{name} is {value}, limit {limit}: VM 'a fox'"
    ids = ["x"] if state == "failed" and against else []
    return {
        "name": name,
        "limit": limit,
        "value": value,
        "state": state,
        "message": message,
        "against": against,
        "ids": ids,
    }


def test_the_first_line_says_what_failed() -> None:
    broken = [rule("max_vm_rate", 0.1, 0.35, "failed"), rule("max_new_flagged", 3, 12.0, "failed", "step-100")]
    records = [record("step-100"), record("step-200", 35, passed=False, policy=broken)]
    said = headline(records)
    assert said["figure"] == "step-200 FAILED: VM rate 35% > 10%"
    assert "newly flagged 12 > 3 (against step-100)" in said["detail"]
    page = render_trend("n", None, records, PolicyConfig(max_vm_rate=0.1))
    main = page[page.index("<main") :]
    assert main.index("step-200 FAILED: VM rate 35% &gt; 10%") < main.index("Share of prompts")
    assert "VM &#39;a fox&#39;" in page  # the first prompts that broke the rule
    good = record("step-300", policy=[rule("max_vm_rate", 0.1, 0.02, "passed")])
    said = headline([*records, good])
    assert said["figure"] == "step-300 passed"
    assert "VM rate 2% ≤ 10%" in said["detail"]
    assert "1 failed: step-200" in said["detail"]


def test_limits_are_lines_where_they_can_be_drawn() -> None:
    records = [record("a", 4), record("b", 35)]
    drawn = chart(records, PolicyConfig(max_vm_rate=0.1, max_memorised_rate=0.2))
    limits = {one["line"]: one["y"] for one in drawn["limits"]}
    assert limits["vm"] == pytest.approx(HEIGHT * (1 - 0.1 / drawn["top"]), abs=0.1)
    assert limits["vm"] > limits["memorised"]  # further down
    assert drawn["beyond"] == []
    far = chart([record("a", 0)], PolicyConfig(max_vm_rate=0.9))
    assert far["limits"] == []
    assert far["beyond"] == [{"line": "vm", "value": 0.9}]
    severe = chart(records, PolicyConfig(max_severity=0.3), ("severity",))
    assert [one["value"] for one in severe["limits"]] == [0.3]
    assert severe["top"] >= 0.3
    nothing = record("c", figures={**figures(), "severity": None})
    assert chart([nothing], PolicyConfig(), ("severity",))["lines"]["severity"][0]["y"] == HEIGHT


def test_checkpoints_are_named_on_the_axis_and_the_newest_always() -> None:
    few = chart([record("step-100"), record("a-training-of-some-length-step-200")])
    assert [one["text"] for one in few["names"]] == ["step-100", "a-trainin…h-step-200"]
    many = chart([record(f"step-{number}") for number in range(100)])
    assert len(many["names"]) <= NAMED
    assert many["names"][-1]["text"] == "step-99"


def test_each_pair_has_a_page_of_changes(kit: Any, tmp_path: Path) -> None:
    labels = {"one": "VM VM VM VM", "two": "NM NM NM NM", "three": "VM VM VM VM"}
    records = []
    for at, (name, label) in enumerate(labels.items()):
        run = kit.write_run(tmp_path / "runs" / name, [kit.Planted("a fox", label, ("ref-1",)), kit.Planted("plain")])
        reduce_run(str(run), images="none")
        before = {"name": records[-1]["name"], "counts": {"new": 1, "gone": 0}} if at else None
        changes = {"previous": before, "baseline": {"name": "one"} if at else None}
        records.append(record(name, slug=name, run=f"runs/{name}", changes=changes))
    twin = {"previous": {"name": "three", "counts": {"new": 0, "gone": 0}}, "baseline": None}
    records.append(record("four", slug="four", run="runs/three", same_as="three", changes=twin))
    records.append(record("lost", slug="lost", run="runs/lost", changes=twin))
    said: list[str] = []
    found = write_pairs(str(tmp_path), records, said.append)
    assert found == {
        ("two", "previous"): "diffs/one--two/diff.html",
        ("three", "previous"): "diffs/two--three/diff.html",
        ("three", "baseline"): "diffs/one--three/diff.html",
    }
    assert len(said) == 1
    assert "no page of changes from four to lost" in said[0]
    page = (tmp_path / found["two", "previous"]).read_text()
    assert "No longer flagged: 1" in page
    assert page.count("data:image/jpeg;base64,") == 2  # what it was, and the training image
    trend = render_trend("n", "one", records, PolicyConfig(), found)
    assert all(f'href="{address}"' in trend for address in found.values())
    (tmp_path / "diffs" / "one--two" / "diff.html").write_text("kept")
    write_pairs(str(tmp_path), records[:2])
    assert (tmp_path / "diffs" / "one--two" / "diff.html").read_text() == "kept"
