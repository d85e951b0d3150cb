"""A disk that is full and models that vanish or change while a run goes on: one line, and the same command goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.scan.job as scan_module
from memscan.errors import IntegrityError, MemscanError, ModelError
from memscan.records import CENSUS
from pipelines.run_folder.runs import Run
from pipelines.scan.job import scan
from pipelines.scan.waves import Target, write_rows

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(out / "census", schema=CENSUS).to_pylist()
    return sorted(rows, key=lambda row: str(row["prompt_id"]))


def is_one_line(error: MemscanError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert all(word in text for word in words), text


def on_a_disk(full: Path) -> Callable[..., pa.Table]:
    """The writer of a scan on a disk without room once the file `full` is there. Pickled by value: it is a closure."""

    def write(table: pa.Table, target: Target, run: str) -> pa.Table:
        def fsync(descriptor: int) -> None:
            if full.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            healthy(descriptor)

        healthy, os.fsync = os.fsync, fsync
        try:
            return write_rows(table, target, run)
        finally:
            os.fsync = healthy
            if not full.exists() and not full.with_name("emptied").exists():
                full.touch()  # one file had room

    return write


def test_a_full_disk_stops_a_scan_in_one_line(
    tiny_world: Any, complete_run: Path, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, out = tmp_path / "full", tmp_path / "run"
    config = tiny_world.config(out, part_size=6, index__path=str(complete_run / "index"))
    monkeypatch.setattr(scan_module, "write_rows", on_a_disk(full))
    with pytest.raises(MemscanError) as caught:
        scan(config)
    is_one_line(caught.value, "part-0000", "cannot write: No space left on device")
    run = Run.load(str(out))
    assert run.state == "failed"
    assert "No space left on device" in run.manifest["error"]
    written = {number: sum(pq.read_metadata(file).num_rows for file in run.files(number)) for number in run.parts}
    assert 0 < sum(written.values()) < 15
    for number in run.parts:  # what is committed is whole
        assert (
            run.committed(number) is None
            or written[number] == pq.read_metadata(run.folder.prompts_part(number)).num_rows
        )
    assert not list(out.rglob("*.tmp"))
    full.rename(tmp_path / "emptied")
    assert scan(config).rows == 15
    assert rows_of(out) == rows_of(complete_run)


def test_a_disk_too_full_for_the_outcome_hides_nothing(
    tiny_world: Any, complete_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even run.json can be written then: what is told is what went wrong first."""
    copy = tmp_path / "run"
    shutil.copytree(complete_run, copy)
    run = Run.load(str(copy))
    run.manifest["state"] = "running"

    def no_room(path: Path, data: bytes, *, replace: bool = True) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("memscan.io.local._write", no_room)
    with pytest.raises(MemscanError, match="the first reason"), scan_module.noted(run):
        raise MemscanError("the first reason")
    assert Run.load(str(copy)).state == "complete"  # as it was written last


def test_models_that_vanish_or_change_after_the_run_began(
    tiny_world: Any, complete_run: Path, in_process: None, tmp_path: Path
) -> None:
    """Between the look at the inputs and the start of the workers; then a worker would find other models."""
    checkpoint, segmenter = tmp_path / "checkpoint", tmp_path / "segmenter.onnx"
    shutil.copytree(tiny_world.folder / "checkpoint", checkpoint)
    shutil.copy(tiny_world.folder / "segmenter.onnx", segmenter)
    out = tmp_path / "run"
    config = tiny_world.config(
        out,
        part_size=6,
        index__path=str(complete_run / "index"),
        generator__path=str(checkpoint),
        segmenter__path=str(segmenter),
    )

    def vanish(_line: str) -> None:
        if (checkpoint / UNET).exists():  # several lines are said
            (checkpoint / UNET).rename(tmp_path / "kept")

    with pytest.raises(ModelError) as caught:
        scan(config, vanish)
    is_one_line(caught.value, str(checkpoint), "unet", "diffusion_pytorch_model.safetensors")
    assert Run.load(str(out)).state == "failed"
    (tmp_path / "kept").rename(checkpoint / UNET)

    def change(_line: str) -> None:
        with segmenter.open("ab") as file:
            file.write(b"\0")

    with pytest.raises(IntegrityError) as changed:
        scan(config, change)
    is_one_line(changed.value, str(segmenter), "the run began with segmenter.onnx@")
    shutil.copy(tiny_world.folder / "segmenter.onnx", segmenter)
    assert scan(config).rows == 15
    assert rows_of(out) == rows_of(complete_run)
