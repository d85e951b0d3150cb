"""A synthetic run in a scan's many small files, reduced here and with every path of Ray that size alone switches on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.synthetic_run import BLOCK, write_synthetic_run
from memscan.census import flagged
from pipelines.reduce import grouping
from pipelines.reduce.grouping import TABLES
from pipelines.reduce.job import reduce_run
from pipelines.run_folder.results import census_files
from pipelines.run_folder.runs import Run

ROWS = 1200


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("synthetic") / "run", ROWS)


def written(run_dir: Path) -> dict[str, bytes]:
    names = [f"flagged/{one}" for one in flagged.NAMES] + [f"clusters/{one}.parquet" for one in TABLES]
    return {name: (run_dir / name).read_bytes() for name in [*names, "flagged/removal.csv"]}


def test_a_scans_small_files_are_reduced_alike(run_dir: Path) -> None:
    """One file a block, rejects and prompts with too few memorised generations among them."""
    assert len(census_files(Run.load(str(run_dir)), False)) == ROWS // BLOCK
    counts = reduce_run(str(run_dir), use_ray=False)["counts"]
    assert counts["flagged"] == ROWS // 20
    assert counts["distinct_prompts"] == counts["done"] + counts["rejected"] == ROWS
    assert counts["rejected"] == 3
    table = flagged.read_parquet(str(run_dir / "flagged" / "flagged.parquet"))
    assert all((run_dir / file).is_file() for file in table["evidence_file"].to_pylist())


@pytest.mark.slow
def test_every_path_of_ray_gives_the_same(run_dir: Path, ray_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = reduce_run(str(run_dir), use_ray=False)
    before = written(run_dir)
    looked = []
    whole = grouping._look_up_here
    monkeypatch.setattr(grouping, "_look_up_here", lambda files, wanted: looked.append(files) or whole(files, wanted))
    for threshold in ("_ENCODE_HERE", "_LOOK_UP_HERE"):
        monkeypatch.setattr(grouping, threshold, 1)
    monkeypatch.setattr(grouping, "_CAPTIONS_A_TASK", 7)
    files = grouping.reference_files(Run.load(str(run_dir)))
    monkeypatch.setattr(grouping, "reference_files", lambda run: [*files, *files])  # as an index of several shards
    assert reduce_run(str(run_dir), use_ray=True) == here
    assert looked == []  # on the workers only
    assert written(run_dir) == before
