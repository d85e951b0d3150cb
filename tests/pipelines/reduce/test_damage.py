"""Silent damage: no bit of a committed file changes a figure unnoticed, and no kill leaves outputs of two reduces."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from memscan.config import VerdictConfig
from memscan.errors import MemscanError, RunError
from memscan.io import storage
from pipelines.reduce.job import reduce_run, report_run
from pipelines.reduce.report import read_census
from pipelines.run_folder.results import census_files
from pipelines.run_folder.runs import Run
from pipelines.scan.repair import mend

FLIPS = 12


def flip(path: Path, source: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(bytes(data))


def test_no_flipped_bit_of_a_census_file_is_judged(run_dir: Path) -> None:
    """One line with the file and its part, and that part alone is opened again."""
    source = random.Random(7)
    files = census_files(Run.load(str(run_dir)), False)
    for _ in range(FLIPS):
        path = Path(source.choice(files))
        good = path.read_bytes()
        flip(path, source)
        with pytest.raises(RunError) as caught:
            reduce_run(str(run_dir), use_ray=False)
        said = str(caught.value)
        assert str(path) in said
        assert re.search(r"part \d+: ", said)
        assert "memscan repair-run" in said
        path.write_bytes(good)
    reduce_run(str(run_dir), use_ray=False)


def test_a_damaged_part_is_opened_again_and_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    run = Run.load(str(run_dir))
    files = census_files(run, False)
    path = Path(files[0])
    number = int(re.search(r"part-(\d+)", str(path))[1])  # type: ignore[index]
    flip(path, random.Random(1))
    stranger = Path(run.folder.census_part(number + 1)) / "stranger.parquet"
    shutil.copy(files[-1], stranger)
    found = mend(str(run_dir))
    assert list(found.rows) == [number]
    assert found.rows[number] > 0
    assert {str(path), str(stranger)} <= found.dropped.keys()
    again = Run.load(str(run_dir))
    assert again.state == "interrupted"
    assert [part for part in again.parts if again.committed(part) is None] == [number]
    assert again.todo(number).num_rows == found.rows[number]
    assert not stranger.exists()


def test_files_of_another_run_are_not_reduced(run_dir: Path, kit: Any, tmp_path: Path, small_census: list[Any]) -> None:
    from pipelines.run_folder.tables import read_table, stamped, to_parquet

    path = Path(census_files(Run.load(str(run_dir)), False)[0])
    foreign = to_parquet(stamped(read_table(str(path)), "0123456789abcdef"))
    record = Path(Run.load(str(run_dir)).commit_path(0))
    content = storage.read_json(record)
    content.pop("sha256", None)  # as in runs of older versions, where only the fingerprint tells
    storage.write_json(record, content)
    path.write_bytes(foreign)
    with pytest.raises(RunError, match=r"is of another run .fingerprint 0123456789abcdef"):
        reduce_run(str(run_dir), use_ray=False)


def test_a_reduce_that_is_killed_at_any_write_leaves_no_mixture(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another rule than before: the old outputs, the new ones, or a line that says to reduce again."""
    write = storage.write_atomic
    before = reduce_run(str(run_dir), use_ray=False)
    step, refused = 0, 0
    while True:
        count = 0

        def killed(path: Any, data: bytes, at: int = step) -> None:
            nonlocal count
            if count == at:
                raise KeyboardInterrupt
            count += 1
            write(path, data)

        monkeypatch.setattr(storage, "write_atomic", killed)
        try:
            reduce_run(str(run_dir), verdict=VerdictConfig(min_share=0.9), use_ray=False, images="none")
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(storage, "write_atomic", write)
        try:
            census = read_census(Run.load(str(run_dir)))
            assert census["method"]["verdict"]["min_share"] in (before["method"]["verdict"]["min_share"], 0.9)
            for name, digest in census["files"].items():
                assert storage.sha256_file(run_dir / name) == digest
        except RunError as error:
            refused += "memscan reduce" in str(error)
        step += 1
    assert refused >= 8
    assert step > 9
    report_run(str(run_dir), images="none")


def test_a_list_of_another_reduce_is_not_reported(run_dir: Path) -> None:
    reduce_run(str(run_dir), use_ray=False)
    path = run_dir / "flagged" / "flagged.csv"
    path.write_bytes(path.read_bytes() + b"\r\n")
    with pytest.raises(MemscanError, match="damaged, or of another reduce; run memscan reduce again"):
        report_run(str(run_dir))
