"""A nightly over single files (`kind: file`): each is scanned on the base, and one that cannot be read is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipelines.cli import app
from tests.pipelines.nightly.conftest import write_watch
from tests.support.original_layout import original
from tests.support.tiny_world import MEMORISED, TinyWorld


def test_each_file_is_scanned_on_the_base(tiny_world: TinyWorld, in_process: None, tmp_path: Path) -> None:
    whole = tiny_world.folder / "checkpoint"
    base = tmp_path / "base"  # no weights: what is flagged can come of a file only
    shutil.copytree(whole, base, ignore=shutil.ignore_patterns("*.safetensors"))
    source, out = tmp_path / "files", tmp_path / "registry"
    source.mkdir()
    last = original(whole)
    name = "model.diffusion_model.out.2.weight"
    first = last | {name: torch.randn(last[name].shape, generator=torch.Generator().manual_seed(0))}
    save_file(first, source / "step-100.safetensors")
    save_file(last, source / "step-200.safetensors")
    save_file({key: one for key, one in last.items() if key != name}, source / "step-300.safetensors")

    panel = {**tiny_world.settings, "generator": {**tiny_world.settings["generator"], "base": str(base)}}
    del panel["generator"]["path"]
    watch = [{"path": str(source), "kind": "file"}]
    file = write_watch(tmp_path / "watch.yaml", panel, str(out), str(source), watch=watch)
    result = CliRunner().invoke(app, ["nightly", str(file)])

    assert result.exit_code == 4, result.output
    rows = {row["name"]: row for row in pq.read_table(out / "history.parquet").to_pylist()}
    assert rows.keys() == {"step-100.safetensors", "step-200.safetensors"}
    assert [rows[f"step-{step}.safetensors"]["flagged"] for step in (100, 200)] == [0, len(MEMORISED)]
    (run,) = (one for one in (out / "runs").iterdir() if one.name.startswith("step-200"))
    flagged = pq.read_table(run / "flagged" / "flagged.parquet", columns=["caption"])
    assert sorted(flagged["caption"].to_pylist()) == sorted(MEMORISED)
    (line,) = (one for one in result.output.splitlines() if "not scanned" in one and "step-300" in one)
    assert "its unet" in line
