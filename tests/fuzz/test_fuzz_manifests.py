"""Manifests of indexes and worlds, calibrations, cards and model folders of any content: read, or refused in one line.

What is read keeps its promises: names stay in their folder, and what is said of files is checked on them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from memscan.config import GeneratorConfig
from memscan.index.manifest import FORMAT, FileEntry, Manifest, Shard
from memscan.io import storage
from memscan.metric.calibration import Calibration
from memscan.mitigation.card import read_card
from memscan.mitigation.switches import read_switches
from memscan.models.adapters import adapter_in, check_components
from memscan.models.folders import check_checkpoint
from memscan.planted.world import check_world, shipped_world, world_facts, world_source
from pipelines.run_folder.runs import Run
from tests.fuzz.damage import files_of, one_line

QUIET = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ENTRY = FileEntry(3, "ab" * 32)
FILES = dict.fromkeys(("whole.faiss", "references.parquet", "ids.arrow"), ENTRY)
INDEX = dataclasses.asdict(
    Manifest(
        format=FORMAT,
        version=2,
        dimension=48,
        regions=("whole",),
        factory="Flat",
        why="small",
        nprobe=1,
        metric="ip",
        embedder="embedder:a@0:b",
        segmenter="segmenter:a@0:b",
        template={"whole.faiss": ENTRY},
        shards=(Shard("00000", 4, "a", "d", FILES), Shard("00001", 2, "e", "f", FILES)),
        removed_file="removed/000002.parquet",
        removed_entry=ENTRY,
        removed_count=1,
        recall={"whole@1": 1.0},
        source_rows=7,
        rejected=1,
    )
)
SHIPPED = shipped_world()
WORLD = json.loads((SHIPPED / "manifest.json").read_text())
CALIBRATION = json.loads((SHIPPED / "calibration.json").read_text())
MODEL = json.loads((SHIPPED / "checkpoint" / "model_index.json").read_text())
UNET = json.loads((SHIPPED / "checkpoint" / "unet" / "config.json").read_text())
SCHEDULE = json.loads((SHIPPED / "checkpoint" / "scheduler" / "scheduler_config.json").read_text())
SHARDS = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../secret.safetensors"}}
CARD = {"format": "memscan-mitigation/1", "method": "nemo", "scope": "all", "fingerprint": "0", "original": {"id": "a"}}
SWITCHES = {"format": "memscan-switches/1", "groups": {"g": {"layer": [1, 2]}}, "prompts": {"p": "g"}}


@QUIET
@given(files_of(INDEX))
def test_an_index_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    manifest = one_line(lambda: Manifest.load(str(tmp_path)))
    if manifest is None:
        return
    assert all(storage.is_inner(name) for name, _ in manifest.files())
    assert len(manifest.starts()) == len(manifest.shards) + 1
    assert manifest.rows >= 0
    assert manifest.hash
    assert one_line(lambda: manifest.verify(str(tmp_path))) is None  # none of its files is there


def test_the_undamaged_index_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(INDEX))
    assert dataclasses.asdict(Manifest.load(str(tmp_path)))["shards"] == INDEX["shards"]


@QUIET
@given(files_of(WORLD))
def test_a_world_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    checks = one_line(lambda: check_world(tmp_path))
    assert all(storage.is_inner(check.name) and check.state == "missing" for check in checks or ())


@QUIET
@given(files_of(json.loads((SHIPPED / "world.json").read_text())))
def test_the_facts_of_a_world(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "world.json").write_bytes(content)
    one_line(lambda: (world_facts(tmp_path), world_source(tmp_path)))


@QUIET
@given(files_of(CALIBRATION))
def test_a_calibration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calibration.json").write_bytes(content)
    found = one_line(lambda: Calibration.load(str(tmp_path / "calibration.json")))
    if found is not None:
        assert 0 <= found.probability("foreground", 0.5) <= 1
        assert 0 <= found.foreground_threshold <= 1


@QUIET
@given(files_of(CARD))
def test_the_card_of_a_repair(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mitigation.json").write_bytes(content)
    one_line(lambda: read_card(tmp_path))


@QUIET
@given(files_of(SWITCHES))
def test_a_switch_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "switches.json").write_bytes(content)
    one_line(lambda: read_switches(str(tmp_path / "switches.json")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped checkpoint, whose JSON files are damaged one at a time."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(SHIPPED / "checkpoint", folder)
    return folder


def _look(folder: Path) -> None:
    config = GeneratorConfig(path=str(folder))
    adapter = adapter_in(folder, config)
    if adapter.kind == "stock":
        check_components(folder)
    else:
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("model_index.json", MODEL),
        ("unet/config.json", UNET),
        ("scheduler/scheduler_config.json", SCHEDULE),
        ("unet/diffusion_pytorch_model.safetensors.index.json", SHARDS),
    ],
)
def test_the_files_of_a_model_folder(model: Path, name: str, good: Any) -> None:
    file, weights = model / name, model / "unet" / "diffusion_pytorch_model.safetensors"
    kept = file.read_bytes() if file.is_file() else None
    moved = weights.with_suffix(".kept") if kept is None else weights  # an index counts where there is no whole file
    weights.rename(moved)

    @settings(max_examples=20)
    @given(files_of(good))
    def damage(content: bytes) -> None:
        file.write_bytes(content)
        one_line(lambda: _look(model))

    try:
        damage()
    finally:
        moved.rename(weights)
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
    one_line(lambda: _look(model))


RUN = {
    "format": 1,
    "name": "n",
    "state": "complete",
    "index": {"path": "i", "hash": "h", "version": 1, "count": 3},
    "prompts": {"parts": 1, "distinct": 2, "rows_read": 2, "part_size": 2, "rejected_at_reading": 0},
    "counts": {"inputs": 2, "rows": 2, "done": 2, "rejected": 0, "generations": 4, "labels": {}, "reasons": {}},
    "identity": {"models.generator": "a@0"},
    "config": {"prompts": {"paths": ["p"]}},
    "models": {"generator": "a@0"},
    "error": None,
    "fingerprint": "0" * 16,
    "config_fingerprint": "0" * 16,
    "code_version": "1",
    "created": "2026-11-25T00:00:00+00:00",
    "updated": "2026-11-25T00:00:00+00:00",
}


@QUIET
@given(files_of({"counts": RUN["counts"], "part": 0}))
def test_a_commit_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "census").mkdir(exist_ok=True)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "census" / "_part-00000.json").write_bytes(content)
    one_line(lambda: Run.load(str(tmp_path)).progress())


def test_the_undamaged_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert Run.load(str(tmp_path)).models == {"generator": "a@0"}


@QUIET
@given(files_of(RUN))
def test_a_run_and_its_status(tmp_path: Path, content: bytes) -> None:
    from pipelines.scan.status import describe, run_status

    (tmp_path / "run.json").write_bytes(content)
    one_line(lambda: Run.load(str(tmp_path)).models)
    one_line(lambda: describe(run_status(str(tmp_path))))
