"""A run folder reduced: everything written, every row accounted for, nothing published that is not complete."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from memscan.census import flagged
from memscan.config import VerdictConfig
from memscan.errors import RunError
from pipelines.reduce.grouping import TABLES
from pipelines.reduce.job import reduce_run, report_run
from pipelines.run_folder.runs import Run


def test_everything_is_written(run_dir: Path, small_census: list[Any]) -> None:
    document = reduce_run(str(run_dir))
    assert json.loads((run_dir / "census.json").read_text()) == document
    table = flagged.read_parquet(str(run_dir / "flagged" / "flagged.parquet"))
    assert table["caption"].to_pylist() == ["a red fox", "a blue door", "a quiet harbour at dawn"]
    assert flagged.read_csv((run_dir / "flagged" / "flagged.csv").read_bytes()).equals(table)
    lines = (run_dir / "flagged" / "flagged.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt_id"] for line in lines] == table["prompt_id"].to_pylist()
    page = (run_dir / "report.html").read_text()
    assert all(caption in page for caption in table["caption"].to_pylist())
    assert "an ordinary caption" not in page


def test_counts_conserve(run_dir: Path, small_census: list[Any]) -> None:
    document = reduce_run(str(run_dir))
    counts = document["counts"]
    assert counts["rows_in"] == sum(prompt.count for prompt in small_census) == 21
    assert counts["distinct_prompts"] == counts["done"] + counts["rejected"] == len(small_census)
    assert counts["rejected_by_reason"] == {"caption_empty": 1, "generation_not_finite": 1}
    assert sum(entry["count"] for entry in document["prompts"]["classes"].values()) == counts["done"]
    assert sum(entry["count"] for entry in document["generations"]["classes"].values()) == counts["generations"]


def test_provenance(run_dir: Path) -> None:
    document = reduce_run(str(run_dir))
    manifest = json.loads((run_dir / "run.json").read_text())
    assert document["run"]["fingerprint"] == manifest["fingerprint"]
    assert document["models"].keys() == {"generator", "segmenter", "embedder"}
    assert document["method"]["thresholds"] == {
        "foreground": 0.8,
        "background": 0.8,
        "source": "calibrated on a test",
        "false_positive_rate": None,
    }
    assert document["partial"] is False
    assert document["run"]["duration_seconds"] >= 0
    metadata = pq.read_schema(run_dir / "flagged" / "flagged.parquet").metadata
    assert metadata[b"memscan.fingerprint"].decode() == manifest["fingerprint"]


def test_urls_come_from_the_index(run_dir: Path) -> None:
    document = reduce_run(str(run_dir))
    table = flagged.read_parquet(str(run_dir / "flagged" / "flagged.parquet")).to_pylist()
    assert table[0]["match_ids"] == ["ref-1", "ref-2"]  # ref-7 is the NM generation's
    assert table[0]["match_urls"] == [f"https://example.org/images/{n}.jpg" for n in (1, 2)]
    assert table[1]["match_urls"] == [None]  # ref-3 has none
    assert document["references"]["missing"] == 0


def test_exhibits_show_generation_match_and_masks(run_dir: Path) -> None:
    reduce_run(str(run_dir))
    page = (run_dir / "report.html").read_text()
    drawn = json.loads(re.search(r'id="pictures">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    shared = ["background", "foreground", "full", "hole", "image", "mask"]
    assert [sorted(one) for one in drawn["prompts"].values()] == [[*shared, "others", "similarity"]] * 3
    # Every training image that a memorised generation matches, not only the best evidence's.
    assert drawn["references"].keys() == {f"ref-{number}" for number in range(1, 7)}
    assert all(sorted(one) == shared for one in drawn["references"].values())
    assert len({one["similarity"] for one in drawn["prompts"].values()}) == 3


@pytest.mark.slow
def test_ray_gives_the_same(kit: Any, ray_once: None, tmp_path: Path, small_census: list[Any]) -> None:
    run_dir = kit.write_run(tmp_path / "run", small_census, part_size=8)
    local = reduce_run(str(run_dir), use_ray=False)
    files = {name: (run_dir / "flagged" / name).read_bytes() for name in flagged.NAMES}
    assert reduce_run(str(run_dir), use_ray=True) == local
    assert {name: (run_dir / "flagged" / name).read_bytes() for name in flagged.NAMES} == files


def test_order_of_rows_does_not_matter(kit: Any, tmp_path: Path, small_census: list[Any]) -> None:
    one = reduce_run(str(kit.write_run(tmp_path / "one", small_census)))
    other = reduce_run(str(kit.write_run(tmp_path / "other", small_census[::-1], part_size=5)))
    for key in ("counts", "prompts", "generations", "rows", "one_to_many", "severity"):
        assert one[key] == other[key]
    lists = [flagged.read_parquet(str(tmp_path / name / "flagged" / "flagged.parquet")) for name in ("one", "other")]
    places = ["row", "evidence_file"]
    assert lists[0].drop(places).equals(lists[1].drop(places))
    for name in (*(f"clusters/{one}" for one in TABLES), "flagged/removal"):
        tables = [pq.read_table(tmp_path / run / f"{name}.parquet") for run in ("one", "other")]
        assert tables[0].equals(tables[1]), name


def test_an_incomplete_run_is_refused(kit: Any, tmp_path: Path, small_census: list[Any]) -> None:
    run_dir = kit.write_run(tmp_path / "run", small_census, finished=False, committed=2)
    with pytest.raises(RunError, match=r"not complete.*resume the scan"):
        reduce_run(str(run_dir))
    assert not (run_dir / "census.json").exists()


def test_partial_is_marked_everywhere(kit: Any, tmp_path: Path, small_census: list[Any]) -> None:
    run_dir = kit.write_run(tmp_path / "run", small_census, finished=False, committed=2)
    shutil.rmtree(Run.load(str(run_dir)).folder.census_part(3))
    document = reduce_run(str(run_dir), partial=True)
    assert document["partial"] is True
    assert document["counts"]["distinct_prompts"] == 12
    assert document["run"]["prompts_total"] == 14
    assert "12 prompts of 14 had been processed" in (run_dir / "report.html").read_text()
    assert pq.read_schema(run_dir / "flagged" / "flagged.parquet").metadata[b"memscan.state"] == b"running"


def test_partial_leaves_out_what_a_resume_would_drop(kit: Any, tmp_path: Path, small_census: list[Any]) -> None:
    run_dir = kit.write_run(tmp_path / "run", small_census, finished=False, committed=0)
    part = Path(Run.load(str(run_dir)).folder.census_part(0))
    shutil.copy(part / "0.parquet", part / "9.parquet")  # a writer that outlived its driver
    (part / "8.parquet").write_bytes((part / "1.parquet").read_bytes()[:-20])  # a writer that was killed
    assert reduce_run(str(run_dir), partial=True)["counts"]["distinct_prompts"] == len(small_census)


def test_rows_that_went_missing_stop_the_reduce(run_dir: Path) -> None:
    file = run_dir / "census" / "part-00001" / "0.parquet"
    pq.write_table(pq.read_table(file).slice(0, 1), file)
    with pytest.raises(RunError, match=r"do not add up.*rows: 14 committed, 13 found"):
        reduce_run(str(run_dir))
    assert not (run_dir / "census.json").exists()


def test_another_rule_needs_no_other_scan(run_dir: Path) -> None:
    document = reduce_run(str(run_dir), verdict=VerdictConfig(min_share=0.25))
    assert document["counts"]["flagged"] == 4
    assert document["method"]["verdict"]["min_share"] == 0.25
    assert "at least 25% of its generations" in (run_dir / "report.html").read_text()


def test_without_its_index_a_run_says_so(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "index")
    document = reduce_run(str(run_dir))
    assert document["references"]["missing"] == document["references"]["matched"] == 6
    assert "6 matched training images were not found" in (run_dir / "report.html").read_text()


def test_another_index_gives_no_evidence(kit: Any, run_dir: Path, tmp_path: Path, small_census: list[Any]) -> None:
    other = kit.write_run(tmp_path / "other", small_census, references=9)
    shutil.rmtree(run_dir / "index")
    shutil.copytree(other / "index", run_dir / "index")
    assert reduce_run(str(run_dir))["references"]["missing"] == 6


def test_a_run_that_was_moved_finds_its_index(run_dir: Path, tmp_path: Path) -> None:
    moved = run_dir.rename(tmp_path / "moved")
    assert reduce_run(str(moved))["references"]["missing"] == 0


def test_report_needs_a_reduced_run(run_dir: Path) -> None:
    with pytest.raises(RunError, match="memscan reduce first"):
        report_run(str(run_dir))
    with pytest.raises(RunError, match="not a run folder"):
        report_run(str(run_dir / "index"))


def test_report_is_written_anew(run_dir: Path) -> None:
    reduce_run(str(run_dir))
    before = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    assert report_run(str(run_dir)) == str(run_dir / "report.html")
    assert (run_dir / "report.html").read_text() == before
    report_run(str(run_dir), images="none")
    assert "data:image/" not in (run_dir / "report.html").read_text()


def test_report_refuses_figures_of_another_run(run_dir: Path) -> None:
    reduce_run(str(run_dir))
    document = json.loads((run_dir / "census.json").read_text())
    document["run"]["fingerprint"] = "0" * 16
    (run_dir / "census.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="another run"):
        report_run(str(run_dir))


def test_a_run_with_rejects_only(kit: Any, tmp_path: Path, small_census: list[Any]) -> None:
    rejected = [prompt for prompt in small_census if prompt.reason]
    document = reduce_run(str(kit.write_run(tmp_path / "run", rejected)))
    assert document["prompts"]["memorised"] == {"count": 0, "total": 0, "rate": None, "low": 0.0, "high": 1.0}
    assert "No prompt was scanned" in (tmp_path / "run" / "report.html").read_text()
