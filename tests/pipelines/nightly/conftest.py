"""Three checkpoints of the shipped planted world: early in its training, memorising, and with its memory weakened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from memscan.planted.world import read_truth, shipped_world, world_config

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
# Share of the memorising UNet in the weakened one; the rest is the early snapshot, which copies nothing.
KEPT = 0.2


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step-900 (the early snapshot), step-1000 (as shipped), step-1000-mitigated."""
    folder = tmp_path_factory.mktemp("checkpoints")
    world = shipped_world()
    for name in ("step-900", "step-1000", "step-1000-mitigated"):
        shutil.copytree(world / "checkpoint", folder / name)
    shutil.copy(world / "snapshot" / UNET, folder / "step-900" / UNET)
    early, late = load_file(world / "snapshot" / UNET), load_file(world / "checkpoint" / UNET)
    mixed = {key: (KEPT * late[key] + (1 - KEPT) * early[key]).astype(late[key].dtype) for key in late}
    save_file(mixed, folder / "step-1000-mitigated" / UNET, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def panel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A census of the world with few prompts, few steps and few references: the planted ones and some others."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("panel")
    config = world_config()
    truth = read_truth().to_pylist()
    planted = [row for row in truth if row["label"] == "VM"][:8]
    ordinary = [row for row in truth if row["label"] == "NM"][:8]
    (folder / "prompts.txt").write_text("\n".join(row["caption"] for row in [*planted, *ordinary]))
    wanted = {key for row in planted for key in row["reference_ids"]}
    references = pq.read_table(config.index.source)
    rows = [at for at, key in enumerate(references["reference_id"].to_pylist()) if key in wanted]
    few = [at for at in range(references.num_rows) if at % 60 == 0]
    pq.write_table(references.take(sorted({*rows, *few})), folder / "references.parquet")
    data = config.model_dump(mode="json")
    data["prompts"] = {"paths": [str(folder / "prompts.txt")]}
    data["index"]["source"] = str(folder / "references.parquet")
    data["generator"] |= {"samples": 2}
    data["resources"] |= {"device": "cpu", "samplers": 1}
    del data["generator"]["path"], data["out"]
    return data


def write_watch(path: Path, panel: dict[str, Any], out: str, source: str, **changes: Any) -> Path:
    """A watch file over one folder."""
    watch = {"name": "planted", "out": out, "census": panel, "watch": [{"path": source}], **changes}
    path.write_text(yaml.safe_dump(watch))
    return path
