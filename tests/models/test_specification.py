"""Hashes that follow content, and only content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from memscan.errors import IntegrityError, ModelError
from memscan.io import storage
from memscan.models.specification import ModelSpec, hash_file, hash_folder, read_verified


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_id() -> None:
    spec = ModelSpec("embedder", "sscd_disc_mixup", "0123456789abcdef" * 4, "small_edge288-bilinear-imagenet")
    assert spec.id == "embedder:sscd_disc_mixup@0123456789ab:small_edge288-bilinear-imagenet"


def test_folder_hash_is_of_names_and_content(tmp_path: Path) -> None:
    files = {"unet__w_dot_safetensors": "1", "config_dot_json": "{}"}
    base = hash_folder(write(tmp_path / "a", **files))
    assert hash_folder(write(tmp_path / "b", **files)) == base
    assert hash_folder(write(tmp_path / "c", **files, README_dot_md="x", _dot_cache__x_dot_json="y")) == base
    assert hash_folder(write(tmp_path / "d", **(files | {"config_dot_json": "{ }"}))) != base
    assert hash_folder(write(tmp_path / "e", vae__w_dot_safetensors="1", config_dot_json="{}")) != base


def test_folder_hash_of_parts(tmp_path: Path) -> None:
    folder = write(tmp_path, unet__w_dot_safetensors="1", index_dot_json="{}", safety__w_dot_safetensors="big")
    parts = hash_folder(folder, ["unet", "index.json"])
    (folder / "safety" / "w.safetensors").write_text("other")
    assert hash_folder(folder, ["index.json", "unet"]) == parts
    assert hash_folder(folder) != parts


def test_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weight or configuration files"):
        hash_folder(tmp_path)


def test_file_hash_is_cached_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    calls = []
    original = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda file: calls.append(file) or original(file))
    for _ in range(3):
        assert hash_file(path) == hashlib.sha256(b"one").hexdigest()
    assert len(calls) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert hash_file(path) == hashlib.sha256(b"two").hexdigest()


def test_read_verified(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"bytes")
    digest = hashlib.sha256(b"bytes").hexdigest()
    assert read_verified(str(path), None) == (b"bytes", digest)
    assert read_verified(str(path), f" {digest.upper()}\n") == (b"bytes", digest)
    with pytest.raises(IntegrityError, match=f"sha256 is {digest}, expected {'0' * 64}"):
        read_verified(str(path), "0" * 64)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelError, match="no such model file"):
            read_verified(str(missing), None)
