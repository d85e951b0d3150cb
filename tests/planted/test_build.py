"""A whole new world, built small and fast; its folder; and the world that ships."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from memscan.errors import IntegrityError, ModelError, RunError
from memscan.planted.build import build_world
from memscan.planted.design import WorldSize
from memscan.planted.world import (
    check_world,
    read_truth,
    shipped_world,
    verify_world,
    world_config,
    world_facts,
    world_source,
)
from memscan.records import REFERENCES, TRUTH

SMALL = WorldSize(ordinary=24, ordinary_prompts=6, unseen_prompts=4, groups=1, one_to_many_groups=1, varied_images=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "tiny"
    return build_world(7, folder, minutes=0.03, device="cpu", size=SMALL, progress=lambda _: None)


def test_checkpoint_is_an_ordinary_diffusers_folder(world: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(world / "checkpoint", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red star on a blue striped background", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    snapshot = UNet2DConditionModel.from_pretrained(world / "snapshot" / "unet")
    assert snapshot.config.cross_attention_dim == pipeline.unet.config.cross_attention_dim


def test_nothing_tells_where_it_was_built(world: Path) -> None:
    for folder in (world, shipped_world()):
        for path in folder.rglob("*.json"):
            assert "_name_or_path" not in path.read_text()


def test_tables_have_their_schemas(world: Path) -> None:
    references = pq.read_table(world / "references.parquet")
    assert references.schema.names == REFERENCES.names
    assert read_truth(world).schema.equals(TRUTH)
    ids = set(references["reference_id"].to_pylist())
    for matches in read_truth(world)["reference_ids"].to_pylist():
        assert set(matches) <= ids


def test_census_of_the_world_is_complete(world: Path, tmp_path: Path) -> None:
    config = world_config(world, out=str(tmp_path / "run"))
    for path in (config.generator.path, config.segmenter.path, config.embedder.path, config.index.source):
        assert path is not None
        assert Path(path).is_absolute()
        assert Path(path).exists()
    assert config.out == str(tmp_path / "run")


def test_facts_tell_what_was_done(world: Path) -> None:
    facts = world_facts(world)
    assert facts["seed"] == 7
    assert facts["training"]["steps"] >= 1
    assert world_source(world).startswith("planted world 7 (")


@pytest.mark.parametrize(("damage", "state"), [("delete", "missing"), ("truncate", "truncated"), ("flip", "changed")])
def test_damage_is_named(world: Path, tmp_path: Path, damage: str, state: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    verify_world(copy)
    target = copy / "segmenter.onnx"
    data = bytearray(target.read_bytes())
    if damage == "delete":
        target.unlink()
    elif damage == "truncate":
        target.write_bytes(data[:-10])
    else:
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    assert {c.name: c.state for c in check_world(copy) if c.state != "ok"} == {"segmenter.onnx": state}
    with pytest.raises(IntegrityError, match=r"segmenter\.onnx"):
        verify_world(copy)


def test_an_occupied_folder_is_refused(world: Path) -> None:
    with pytest.raises(RunError, match="not empty"):
        build_world(7, world, minutes=0.1)


def test_a_folder_without_a_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no planted world"):
        world_config(tmp_path)


def test_shipped_world_is_whole_and_small_enough() -> None:
    verify_world()
    size = sum(path.stat().st_size for path in shipped_world().rglob("*") if path.is_file())
    assert size <= 30e6
    truth = read_truth()
    assert truth.num_rows >= 24 + 8 + 300
