"""A LoRA that memorised one planted image: its base is clean of it, the nightly over its versions finds it.

`tests/support/planted_lora.py` trained it; the files are float16, as they were after some steps of the training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from typer.testing import CliRunner

from memscan.config import CensusConfig, parse_config
from memscan.planted.world import read_truth, shipped_world, world_config
from pipelines.cli import app
from pipelines.reduce.job import reduce_run
from pipelines.scan.job import scan
from tests.pipelines.nightly.conftest import write_watch
from tests.support.planted_lora import KEPT, target

VERSIONS = Path(__file__).parents[2] / "data" / "planted_lora"
BASE = shipped_world() / "checkpoint"


def panel(folder: Path) -> dict[str, Any]:
    """The caption of the image with three other ordinary ones; the image among forty others."""
    config, wanted = world_config(), target()
    others = [row["caption"] for row in read_truth().to_pylist() if row["label"] == "NM"]
    captions = [wanted.caption, *[one for one in others if one != wanted.caption][:3]]
    (folder / "prompts.txt").write_text("\n".join(captions))
    table = pq.read_table(config.index.source)
    ids = table["reference_id"].to_pylist()
    pq.write_table(
        table.take(sorted({ids.index(wanted.reference_id), *range(0, len(ids), 75)})), folder / "references.parquet"
    )
    data = config.model_dump(mode="json")
    data["prompts"] = {"paths": [str(folder / "prompts.txt")]}
    data["index"]["source"] = str(folder / "references.parquet")
    data["generator"] |= {"samples": 2, "base": str(BASE)}
    data["resources"] |= {"device": "cpu", "samplers": 1}
    del data["generator"]["path"], data["out"]
    return data


def alone(data: dict[str, Any], out: Path) -> CensusConfig:
    """The same census of the base itself."""
    generator = {key: value for key, value in data["generator"].items() if key != "base"} | {"path": str(BASE)}
    return parse_config({**data, "name": "base", "out": str(out), "generator": generator})


def removed(run: Path) -> set[str]:
    return set(pq.read_table(run / "flagged" / "removal.parquet")["reference_id"].to_pylist())


def test_the_base_is_clean_and_the_nightly_follows_the_lora(in_process: None, tmp_path: Path) -> None:
    data, wanted = panel(tmp_path), target()
    base = tmp_path / "base"
    scan(alone(data, base), lambda text: None)
    reduce_run(str(base))
    assert json.loads((base / "census.json").read_text())["counts"]["flagged"] == 0
    assert removed(base) == set()

    source, out = tmp_path / "loras", tmp_path / "registry"
    shutil.copytree(VERSIONS, source)
    shutil.rmtree(source / "__pycache__", ignore_errors=True)
    watch = write_watch(
        tmp_path / "watch.yaml",
        data,
        str(out),
        str(source),
        watch=[{"path": str(source), "kind": "lora"}],
        policy={"max_vm_rate": 0.2, "max_new_flagged": None},
    )
    result = CliRunner().invoke(app, ["nightly", str(watch)])
    assert result.exit_code == 3, result.output
    rows = {row["name"]: row for row in pq.read_table(out / "history.parquet").to_pylist()}
    assert [*rows] == [f"step-{step}.safetensors" for step in KEPT]
    rates = [row["vm_rate"] for row in rows.values()]
    assert rates[0] == 0
    assert rates[-1] == 0.25  # the one caption of four
    runs = {json.loads((run / "run.json").read_text())["name"]: run for run in (out / "runs").iterdir()}
    last = next(run for name, run in runs.items() if f"step-{KEPT[-1]}" in name)
    assert removed(last) == {wanted.reference_id}
    flagged = pq.read_table(last / "flagged" / "flagged.parquet").to_pylist()
    assert [row["caption"] for row in flagged] == [wanted.caption]
    assert "FAILED" in result.stdout
    assert f"step-{KEPT[-1]}" in result.stdout
