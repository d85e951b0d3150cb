"""The look at the checkpoint as a scan and `memscan doctor` take it: with the census's own references and captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memscan.config import CensusConfig
from memscan.errors import ModelError
from memscan.planted.world import shipped_world, world_config
from pipelines.cli import app
from pipelines.reduce.job import reduce_run
from pipelines.run_folder.runs import Run
from pipelines.scan.job import scan
from pipelines.scan.sanity import look, measure, references_of
from tests.support.tiny_world import TinyWorld


def with_checkpoint(folder: Path) -> CensusConfig:
    config = world_config()
    return config.model_copy(update={"generator": config.generator.model_copy(update={"path": str(folder)})})


def test_the_planted_model_is_seen_to_denoise_its_references() -> None:
    config = world_config()
    assert len(references_of(config)) == 8
    found, words = measure(config, ["a red cup"], "cpu", 1, {})
    assert found["passed"]
    assert found["error_left"]["references"]["v_prediction"] < 0.6 < found["error_left"]["references"]["epsilon"]
    assert "denoises as v_prediction" in words


def test_a_wrong_prediction_type_is_refused_by_doctors_look(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shipped_world() / "checkpoint", tmp_path / "wrong"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("v_prediction", "epsilon"))
    stock = with_checkpoint(folder)
    stock = stock.model_copy(update={"generator": stock.generator.model_copy(update={"adapter": "stock"})})
    with pytest.raises(ModelError, match=r"read as epsilon"):
        look(stock)
    with pytest.raises(ModelError, match=r"read as epsilon.*set prediction_type to v_prediction"):
        look(with_checkpoint(folder))


def test_it_is_no_part_of_a_runs_identity() -> None:
    config = world_config()
    off = config.model_copy(update={"generator": config.generator.model_copy(update={"sanity": "off"})})
    assert off.content() == config.content()
    assert "sanity" not in config.content()["generator"]


def test_an_index_whose_source_is_gone_has_no_references() -> None:
    config = world_config()
    index = config.index.model_copy(update={"source": "/nowhere/references.parquet"})
    assert references_of(config.model_copy(update={"index": index})) == []


def refused(world: TinyWorld, folder: Path) -> None:
    """`memscan scan` of a model that makes no images says so in one line, and has built and scanned nothing."""
    watched = world.write_yaml(folder / "census.yaml", folder / "run")
    result = CliRunner().invoke(app, ["scan", str(watched), "--set", "generator.sanity=auto"])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("memscan: ")]
    assert "generator.sanity: off" in line  # random weights: the autoencoder is the first that fails
    assert "Traceback" not in result.output
    run = folder / "run"
    assert not (run / "index").exists()
    assert not list(run.glob("census/*.parquet"))
    assert Run.load(str(run)).state != "complete"


def test_a_scan_refuses_before_anything_is_built(tiny_world: TinyWorld, in_process: None, tmp_path: Path) -> None:
    refused(tiny_world, tmp_path)


def test_the_refusal_comes_over_ray_in_one_line(tiny_world: TinyWorld, ray_once: None, tmp_path: Path) -> None:
    refused(tiny_world, tmp_path)


def test_captions_that_are_cut_off_are_counted_and_said(
    tiny_world: TinyWorld, in_process: None, tmp_path: Path
) -> None:
    """The tiny model takes 16 tokens, a character each, begin and end among them."""
    (tmp_path / "prompts.txt").write_text("\n".join(["a" * 14, "b" * 15, "c" * 40, "d"]))
    config = tiny_world.config(tmp_path / "run", prompts__paths=[str(tmp_path / "prompts.txt")])
    said: list[str] = []
    scan(config, said.append)
    facts = Run.load(str(tmp_path / "run")).manifest["generator"]
    assert facts["captions"] == {"tokens": 16, "captions": 4, "cut_off": 2}
    (line,) = [line for line in said if "captions are longer" in line]
    assert "2 of 4 captions are longer than the 16 tokens" in line
    reduce_run(str(tmp_path / "run"))
    method = json.loads((tmp_path / "run" / "census.json").read_text())["method"]["generator"]
    assert method["captions"]["cut_off"] == 2
    assert any("2 of 4 captions" in warning for warning in method["warnings"])
