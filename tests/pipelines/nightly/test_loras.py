"""A LoRA that was trained to memorise one image: its base is clean of it, and a nightly over its versions finds it.

The versions ship with the package (made by `memscan planted lora`): before the training, in the middle, at the end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from typer.testing import CliRunner

from memscan.config import parse_config
from memscan.planted.lora import LoraTraining, ordinary_image, shipped_lora
from memscan.planted.world import read_truth, shipped_world, world_config
from pipelines.cli import app
from pipelines.reduce.job import reduce_run
from pipelines.scan.job import scan
from tests.pipelines.nightly.conftest import write_watch

STEPS = LoraTraining().steps


def panel(folder: Path) -> dict[str, Any]:
    """A census of the memorised caption and three other ordinary ones, on the shipped checkpoint as the base."""
    config, target = world_config(), ordinary_image()
    captions = [row["caption"] for row in read_truth().to_pylist() if row["label"] == "NM"]
    others = [caption for caption in captions if caption != target.caption][:3]
    (folder / "prompts.txt").write_text("\n".join([target.caption, *others]))
    table = pq.read_table(config.index.source)
    own = table["reference_id"].to_pylist().index(target.reference_id)
    pq.write_table(table.take(sorted({own, *range(0, len(table), 75)})), folder / "references.parquet")
    data = config.model_dump(mode="json")
    data["prompts"] = {"paths": [str(folder / "prompts.txt")]}
    data["index"]["source"] = str(folder / "references.parquet")
    data["generator"] |= {"samples": 2, "base": str(shipped_world() / "checkpoint")}
    data["resources"] |= {"device": "cpu", "samplers": 1}
    del data["generator"]["path"], data["out"]
    return data


def removed(run: Path) -> list[str]:
    found: list[str] = pq.read_table(run / "flagged" / "removal.parquet")["reference_id"].to_pylist()
    return found


def test_the_base_is_clean_and_the_nightly_follows_the_lora(in_process: None, tmp_path: Path) -> None:
    data, target = panel(tmp_path), ordinary_image()
    clean = tmp_path / "clean"
    base = {key: value for key, value in data["generator"].items() if key != "base"}
    generator = {**base, "path": data["generator"]["base"]}
    scan(parse_config({**data, "name": "base", "out": str(clean), "generator": generator}), lambda text: None)
    reduce_run(str(clean))
    assert json.loads((clean / "census.json").read_text())["counts"]["flagged"] == 0
    assert removed(clean) == []

    source, out = tmp_path / "loras", tmp_path / "registry"
    shutil.copytree(shipped_lora(), source)
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
    assert f"FAILED        step-{STEPS}.safetensors" in result.stdout
    rows = {row["name"]: row for row in pq.read_table(out / "history.parquet").to_pylist()}
    versions = [f"step-{step}.safetensors" for step in (0, STEPS // 2, STEPS)]
    assert sorted(rows) == sorted(versions)
    first, half, last = (rows[name] for name in versions)
    assert (first["flagged"], first["vm_rate"]) == (0, 0)
    assert first["severity"] <= half["severity"] < last["severity"]
    assert last["vm_rate"] == 0.25  # the one caption of four
    (run,) = [one for one in (out / "runs").iterdir() if one.name.startswith(f"step-{STEPS}.")]
    assert removed(run) == [target.reference_id]
    flagged = pq.read_table(run / "flagged" / "flagged.parquet").to_pylist()
    assert [row["caption"] for row in flagged] == [target.caption]
