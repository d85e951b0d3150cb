"""Two runs compared: every prompt that changed is named once, rates are paired, hostile text stays text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from memscan.census import flagged
from memscan.census.diff import paired_interval
from memscan.census.trend import mcnemar
from memscan.records import CHANGES, prompt_id, sample_seed
from pipelines.cli import app
from pipelines.reduce.diff import diff_runs, write_diff
from pipelines.reduce.job import reduce_run

HOSTILE = '=cmd()<script>alert(1)</script>"'


@pytest.fixture(scope="module")
def runs(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two runs over almost the same prompts: 2 newly flagged, 1 no longer, 1 with another class."""
    labels = {
        HOSTILE: ("NM NM NM NM", "VM VM VM NM"),
        "a fox": ("NM NM NM NM", "BM BM BM BM"),
        "a door": ("FM FM FM FM", "NM NM NM NM"),
        "a harbour": ("BM BM BM BM", "VM VM VM VM"),
        "a poster": ("VM VM VM VM", "VM VM VM VM"),
        **{f"ordinary {number}": ("NM NM NM NM", "NM NM NM NM") for number in range(6)},
    }
    folder = tmp_path_factory.mktemp("diff")
    found = []
    for side, name in enumerate(("before", "after")):
        prompts = [kit.Planted(caption, both[side], ("ref-1", "ref-2")) for caption, both in labels.items()]
        prompts.append(kit.Planted(f"only {name}", "VM VM VM VM"))
        reduce_run(str(kit.write_run(folder / name, prompts, part_size=20)), images="none")
        found.append(str(folder / name))
    return found[0], found[1]


def test_every_change_is_named_once(runs: tuple[str, str], tmp_path: Path) -> None:
    diff = diff_runs(*runs)
    changes = {row["caption"]: row for row in diff.changes.to_pylist()}
    assert {caption: row["change"] for caption, row in changes.items()} == {
        HOSTILE: "new",
        "a fox": "new",
        "a door": "gone",
        "a harbour": "relabelled",
    }
    assert (changes["a harbour"]["label_before"], changes["a harbour"]["label_after"]) == ("BM", "VM")
    assert (changes["a door"]["label_after"], changes["a door"]["severity_after"]) == ("NM", None)
    document = diff.document
    assert document["common"] == 11
    assert document["counts"] == {"new": 2, "gone": 1, "relabelled": 1}
    assert (document["only_before"], document["only_after"]) == (1, 1)
    assert document["settings"] == {}
    paths = write_diff(str(tmp_path), diff)
    assert json.loads(Path(paths[0]).read_text()) == document
    assert pq.read_table(tmp_path / "changes.parquet").cast(CHANGES).equals(diff.changes)
    assert flagged.read_csv((tmp_path / "changes.csv").read_bytes(), CHANGES).equals(diff.changes)
    page = Path(paths[-1]).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_rates_are_paired(runs: tuple[str, str]) -> None:
    rates = diff_runs(*runs).document["rates"]
    for name, before, after, gained, lost in (
        ("memorised", 3, 4, 2, 1),
        ("VM", 1, 3, 2, 0),
        ("FM", 1, 0, 0, 1),
        ("BM", 1, 1, 1, 1),
    ):
        rate = rates[name]
        assert (rate["before"]["count"], rate["after"]["count"]) == (before, after)
        assert (rate["gained"], rate["lost"]) == (gained, lost)
        assert rate["difference"] == pytest.approx((after - before) / 11)
        assert rate["p_value"] == mcnemar(gained, lost)
        assert rate["low"] <= rate["difference"] <= rate["high"]


def test_a_run_beside_itself_has_no_difference(runs: tuple[str, str]) -> None:
    diff = diff_runs(runs[0], runs[0])
    assert diff.changes.num_rows == 0
    assert all(rate["difference"] == 0 and rate["p_value"] == 1 for rate in diff.document["rates"].values())


def test_other_settings_are_named(kit: Any, runs: tuple[str, str], tmp_path: Path) -> None:
    other = kit.write_run(tmp_path / "run", [kit.Planted("a fox")], metric={"canvas": 192, "foreground_threshold": 0.7})
    reduce_run(str(other), images="none")
    settings = diff_runs(runs[0], str(other)).document["settings"]
    assert settings["canvas"] == [176, 192]
    assert settings["foreground threshold"][1] == 0.7


def test_command(runs: tuple[str, str], tmp_path: Path, kit: Any) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["diff", *runs, "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0
    assert "McNemar p" in shown.stdout
    assert (tmp_path / "out" / "diff.html").is_file()
    found = json.loads(runner.invoke(app, ["diff", *runs, "--json"]).stdout)
    assert len(found["changes"]) == 4
    raw = kit.write_run(tmp_path / "raw", [kit.Planted("a fox")])
    failed = runner.invoke(app, ["diff", runs[0], str(raw)])
    assert failed.exit_code == 2
    assert "run memscan reduce first" in failed.stderr
    reduce_run(str(kit.write_run(tmp_path / "apart", [kit.Planted("elsewhere")])))
    assert "no prompt in common" in runner.invoke(app, ["diff", runs[0], str(tmp_path / "apart")]).stderr


def test_pictures_before_and_after(runs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run kept is shown; what it did not keep is drawn anew where that is asked for, from the census's seeds."""
    diff = diff_runs(*runs, pictures=True)
    sides = {row["caption"]: diff.sides[row["prompt_id"]] for row in diff.changes.to_pylist()}
    assert (sides["a fox"].before, sides["a door"].after) == (None, None)
    assert sides["a harbour"].before
    assert sides["a harbour"].after
    assert [one.reference_id for one in sides["a harbour"].matches] == ["ref-1"]
    page = Path(write_diff(str(tmp_path / "kept"), diff)[-1]).read_text()
    assert page.count("not kept, as it is not memorised") == 3
    assert page.count("data:image/jpeg;base64,") == 5 + 4  # generations, training images
    assert "memscan diff --draw" in page
    asked: list[tuple[str, int]] = []

    class Drawing:
        def generate(self, captions: list[str], seeds: list[int]) -> Any:
            asked.extend(zip(captions, seeds, strict=True))
            images = np.full((len(seeds), 8, 8, 3), 90, np.uint8)
            return SimpleNamespace(images_BHWC=images, finite_B=np.ones(len(seeds), bool))

    monkeypatch.setattr("memscan.worker.generation.load_generator", lambda config, device: Drawing())
    drawn = diff_runs(*runs, pictures=True, draw=True)
    assert {caption for caption, _ in asked} == {HOSTILE, "a fox", "a door"}
    assert all(seed in {sample_seed(prompt_id(caption), at) for at in range(4)} for caption, seed in asked)
    page = Path(write_diff(str(tmp_path / "drawn"), drawn)[-1]).read_text()
    assert page.count("drawn anew") >= 3
    assert "not kept" not in page
    blurred = Path(write_diff(str(tmp_path / "blur"), diff, show="blur")[-1]).read_text()
    assert '<body class="blur">' in blurred
    assert "data:image" not in Path(write_diff(str(tmp_path / "none"), diff, show="none")[-1]).read_text()


def test_the_command_draws_for_a_page_only(runs: tuple[str, str]) -> None:
    refused = CliRunner().invoke(app, ["diff", *runs, "--draw"])
    assert refused.exit_code == 2
    assert "--draw needs a page with pictures" in refused.stderr


def test_paired_interval_covers() -> None:
    """95 % intervals hold the true difference in about 95 % of draws: 2,000 draws have a spread of 0.5 points."""
    rng = np.random.default_rng(1)
    up, down, total = 0.08, 0.03, 300
    draws = rng.multinomial(total, (up, down, 1 - up - down), size=2000)
    bounds = [paired_interval(int(gained), int(lost), total) for gained, lost, _ in draws]
    assert 0.93 < np.mean([low <= up - down <= high for low, high in bounds]) < 0.98


def test_paired_interval_by_hand() -> None:
    low, high = paired_interval(8, 2, 98)  # of 100 with halves added: (8.5 - 2.5) / 100, spread of 11 - 0.36
    half = 1.959964 * np.sqrt(11 - 36 / 100) / 100
    assert (low, high) == pytest.approx((0.06 - half, 0.06 + half), abs=1e-6)
    assert paired_interval(0, 0, 0)[0] == -paired_interval(0, 0, 0)[1]
    with pytest.raises(ValueError, match="gained"):
        paired_interval(3, 3, 5)
