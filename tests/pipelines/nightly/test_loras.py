"""A LoRA that holds a memorised planted image: its base is clean of it, the nightly over its versions finds it.

The base is the planted model before it memorised, its early snapshot; the LoRA is what the rest of the training did to
its layers, at full rank, and its versions are shares of that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from memscan.config import CensusConfig, parse_config
from memscan.planted.world import read_truth, shipped_world, world_config
from pipelines.cli import app
from pipelines.reduce.job import reduce_run
from pipelines.scan.job import scan
from tests.pipelines.nightly.conftest import write_watch

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
SHARES = {"step-100": 0.2, "step-500": 0.8, "step-1000": 1.0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The planted checkpoint with its early denoiser."""
    folder = Path(shutil.copytree(shipped_world() / "checkpoint", tmp_path / "base"))
    shutil.copy(shipped_world() / "snapshot" / UNET, folder / UNET)
    return folder


def write_loras(folder: Path) -> None:
    """up is the identity and down a share of the difference, for every layer with a matrix."""
    early, late = (load_file(shipped_world() / part / UNET) for part in ("snapshot", "checkpoint"))
    folder.mkdir()
    for name, share in SHARES.items():
        tensors = {}
        for key, weight in early.items():
            if weight.ndim > 1 and key.endswith(".weight"):
                identity = torch.eye(len(weight)).reshape(len(weight), len(weight), *[1] * (weight.ndim - 2))
                layer = f"unet.{key.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = share * (late[key].float() - weight.float())
                tensors[f"{layer}.lora_B.weight"] = identity
        save_file(tensors, folder / f"{name}.safetensors")


def panel(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A census of one planted caption and three ordinary ones, and the truth about the first."""
    config = world_config()
    truth = read_truth().to_pylist()
    planted = next(row for row in truth if row["label"] == "VM" and not row["one_to_many"])
    ordinary = [row["caption"] for row in truth if row["label"] == "NM"][:3]
    (folder / "prompts.txt").write_text("\n".join([planted["caption"], *ordinary]))
    table = pq.read_table(config.index.source)
    ids = table["reference_id"].to_pylist()
    rows = {ids.index(key) for key in planted["reference_ids"]} | set(range(0, len(ids), 75))
    pq.write_table(table.take(sorted(rows)), folder / "references.parquet")
    data = config.model_dump(mode="json")
    data["prompts"] = {"paths": [str(folder / "prompts.txt")]}
    data["index"]["source"] = str(folder / "references.parquet")
    data["generator"] |= {"samples": 2, "base": str(base)}
    data["resources"] |= {"device": "cpu", "samplers": 1}
    del data["generator"]["path"], data["out"]
    return data, planted


def alone(data: dict[str, Any], base: Path, out: Path) -> CensusConfig:
    """The same census of the base itself."""
    generator = {key: value for key, value in data["generator"].items() if key != "base"} | {"path": str(base)}
    return parse_config({**data, "name": "base", "out": str(out), "generator": generator})


def removed(run: Path) -> set[str]:
    return set(pq.read_table(run / "flagged" / "removal.parquet")["reference_id"].to_pylist())


def test_the_base_is_clean_and_the_nightly_follows_the_lora(base: Path, in_process: None, tmp_path: Path) -> None:
    data, planted = panel(tmp_path, base)
    clean = tmp_path / "clean"
    scan(alone(data, base, clean), lambda text: None)
    reduce_run(str(clean))
    assert json.loads((clean / "census.json").read_text())["counts"]["flagged"] == 0
    assert removed(clean) == set()

    source, out = tmp_path / "loras", tmp_path / "registry"
    write_loras(source)
    watch = write_watch(
        tmp_path / "watch.yaml",
        data,
        str(out),
        str(source),
        watch=[{"path": str(source), "kind": "lora"}],
        policy={"max_vm_rate": 0.2},
    )
    result = CliRunner().invoke(app, ["nightly", str(watch)])
    assert result.exit_code == 3, result.output
    assert "FAILED        step-1000.safetensors" in result.stdout
    rows = pq.read_table(out / "history.parquet").to_pylist()
    assert {row["name"] for row in rows} == {f"{name}.safetensors" for name in SHARES}
    rates = {row["name"]: row["vm_rate"] for row in rows}
    assert rates["step-100.safetensors"] == 0
    assert rates["step-1000.safetensors"] == 0.25  # the one caption of four
    (last,) = [run for run in (out / "runs").iterdir() if run.name.startswith("step-1000")]
    assert removed(last)
    assert removed(last) <= set(planted["reference_ids"])
    flagged = pq.read_table(last / "flagged" / "flagged.parquet").to_pylist()
    assert [row["caption"] for row in flagged] == [planted["caption"]]
