"""Silent damage: no bit of a committed file changes a figure unnoticed, and no kill leaves outputs of two reduces."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscan.config import VerdictConfig
from memscan.errors import MemscanError, RunError
from memscan.io import storage
from pipelines.reduce import job
from pipelines.reduce.job import reduce_run, report_run
from pipelines.reduce.outputs import LISTS, switch
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


def test_a_reduce_that_is_killed_at_any_step_leaves_all_of_one_reduce(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Under another rule than before, at some of its writes and removals: the old outputs, or the new ones, whole.

    Which, MEMSCAN_TEST_SEED says; all of them with MEMSCAN_EXHAUSTIVE=1.
    """
    real = {name: getattr(storage, name) for name in ("write_atomic", "remove_tree")}
    monkeypatch.setattr("os.fsync", lambda _: None)

    class Killed(BaseException):
        """Nothing that comes after it is done, as after SIGKILL."""

    def outputs() -> dict[str, bytes]:
        read_census(Run.load(str(run_dir)))  # as every reader does first
        files = [run_dir / name for name in (*LISTS, "report.html", "census.json")]
        return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}

    def reduced(share: float) -> dict[str, bytes]:
        reduce_run(str(run_dir), verdict=VerdictConfig(min_share=share), use_ray=False, images="none")
        return outputs()

    def killed_at(step: float) -> int:
        """A reduce by the other rule, which ends at its so manieth write or removal; how many there were."""
        count = 0

        def until(name: str) -> Any:
            def call(*arguments: Any) -> None:
                nonlocal count
                count += 1
                if count > step:
                    raise Killed
                real[name](*arguments)

            return call

        with monkeypatch.context() as patch, suppress(Killed):
            for name in real:
                patch.setattr(storage, name, until(name))
            reduce_run(str(run_dir), verdict=VerdictConfig(min_share=0.9), use_ray=False, images="none")
        return count

    new, old = reduced(0.9), reduced(0.5)
    assert old["census.json"] != new["census.json"]
    steps = killed_at(math.inf)
    assert steps > 2 * len(LISTS)  # written, switched, copied where they differ, cleared away
    tried = range(steps) if "MEMSCAN_EXHAUSTIVE" in os.environ else sorted(rng.choice(steps, 8, replace=False).tolist())
    for step in tried:
        for name, data in old.items():
            (run_dir / name).write_bytes(data)
        shutil.rmtree(run_dir / ".reduce", ignore_errors=True)
        killed_at(step)
        found = outputs()
        assert found in (old, new), step
        assert (found == old) == (step <= len(LISTS) + 1), step
    assert reduced(0.9) == new
    assert not (run_dir / ".reduce").exists()
    assert {
        f"{one.parent.name}/{one.name}" for name in ("flagged", "clusters") for one in (run_dir / name).iterdir()
    } == {*LISTS}


def test_of_two_reduces_at_once_one_stays_whole(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second whole within the first: the first finds its files swept, and says so."""
    first = switch

    def overtaken(folder: str, staged: str, document: dict[str, Any]) -> None:
        monkeypatch.setattr(job, "switch", first)
        reduce_run(str(run_dir), verdict=VerdictConfig(min_share=0.9), use_ray=False, images="none")
        first(folder, staged, document)

    monkeypatch.setattr(job, "switch", overtaken)
    with pytest.raises(
        MemscanError, match=r"another reduce of this run was written in the meantime .*; run memscan reduce again"
    ):
        reduce_run(str(run_dir), verdict=VerdictConfig(min_share=0.5), use_ray=False, images="none")
    assert read_census(Run.load(str(run_dir)))["method"]["verdict"]["min_share"] == 0.9


def test_a_list_of_another_reduce_is_not_reported(run_dir: Path) -> None:
    reduce_run(str(run_dir), use_ray=False)
    path = run_dir / "flagged" / "flagged.csv"
    path.write_bytes(path.read_bytes() + b"\r\n")
    with pytest.raises(MemscanError, match="it is damaged, or belongs to another reduce; run memscan reduce again"):
        report_run(str(run_dir))
