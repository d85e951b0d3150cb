"""Model folders on s3://: copied once, whole, anew when an object changes; no pickles, no way out of the folder."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from memscan.errors import InputError, ModelError
from memscan.io import storage
from memscan.models.local_copy import stage

FILES = {
    "model_index.json": b"{}",
    "unet/config.json": b"{}",
    "unet/w.safetensors": b"weights",
    "unet/w.bin": b"pickle",
}


@pytest.fixture
def model(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEMSCAN_CACHE", str(tmp_path / "cache"))
    for name, data in FILES.items():
        storage.write_atomic(f"{s3_bucket}/models/sd/{name}", data)
    return f"{s3_bucket}/models/sd"


def test_weights_and_configuration_are_copied_and_pickles_are_not(model: str) -> None:
    folder = stage(model)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: data for name, data in FILES.items() if not name.endswith(".bin")}
    assert folder.name == "sd"


def test_a_copy_is_made_once_and_anew_when_an_object_changes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stage(model)
    fetched: list[str] = []
    fetch = storage.fetch
    monkeypatch.setattr(storage, "fetch", lambda path, target: (fetched.append(path), fetch(path, target)))
    assert stage(f"{model}/") == folder
    assert fetched == []
    storage.write_atomic(f"{model}/unet/w.safetensors", b"WEIGHTS")  # of the same length
    other = stage(model)
    assert other != folder
    assert (other / "unet" / "w.safetensors").read_bytes() == b"WEIGHTS"
    assert (folder / "unet" / "w.safetensors").read_bytes() == b"weights"


def test_a_copy_that_breaks_off_leaves_none(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = storage.fetch

    def breaks(path: str, target: Path) -> None:
        if path.endswith("w.safetensors"):
            raise InputError("only 3 of 7 bytes arrived", where=path)
        fetch(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch", breaks)
        with pytest.raises(InputError, match="only 3 of 7 bytes"):
            stage(model)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".json", ".safetensors")]
    assert (stage(model) / "unet" / "w.safetensors").read_bytes() == b"weights"


def test_processes_share_one_copy(model: str) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(stage, [model] * 3))) == 1


@pytest.mark.parametrize("name", ["nowhere", "models/empty"])
def test_what_is_no_model_is_refused(model: str, name: str) -> None:
    bucket = model.removesuffix("/models/sd")
    storage.write_atomic(f"{bucket}/models/empty/notes.md", b"x")
    with pytest.raises(ModelError):
        stage(f"{bucket}/{name}")


def test_a_download_that_stops_short_is_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = storage.file_size
    monkeypatch.setattr(storage, "file_size", lambda path: size(path) + 4)
    with pytest.raises(InputError, match="only 7 of 11 bytes arrived"):
        storage.fetch(f"{model}/unet/w.safetensors", tmp_path / "w")
    assert list(tmp_path.glob("*w*")) == []


def test_a_full_disk_is_one_line(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from memscan.errors import MemscanError

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(MemscanError, match="cannot write: No space left on device"):
        storage.fetch(f"{model}/unet/w.safetensors", tmp_path / "w")
