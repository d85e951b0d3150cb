"""Relative paths: a run made with them is found again from anywhere, repaired and verified, and can be moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.config import CensusConfig, parse_config
from memscan.errors import MemscanError, RunError
from memscan.io import storage
from memscan.mitigation.settings import LocalitySettings, MitigationSettings, VerifySettings
from pipelines.evaluate.locality import evaluate_locality
from pipelines.mitigate.job import mitigate
from pipelines.run_folder.places import INSIDE, Places, absolute, local_folder, relative_paths
from pipelines.run_folder.runs import Run
from pipelines.scan.job import open_run, run_content
from pipelines.verify.job import verify
from tests.support.alone import Alone
from tests.support.tiny_world import NEMO_C, TinyWorld

PATHS = {
    "prompts": {"paths": ["data/prompts.csv", "s3://b/p.csv"]},
    "generator": {
        "path": "models/a/sd",
        "switches": "runs/x/switches.json",
        "base": "models/a/base",
        "loras": [{"path": "models/a/l"}],
        "textual_inversions": [{"path": "models/a/words"}],
    },
    "segmenter": {"path": "models/a/seg.onnx"},
    "embedder": {"path": "models/a/e.pt", "sha256": "0" * 64},
    "index": {"path": "runs/x/index", "source": "../images", "image_root": "images"},
    "signals": {"semantic": {"path": "models/a/clip.pt", "sha256": "0" * 64}},
    "clusters": {"encoder": "sentence", "path": "./minilm"},
}

SHORT = {"batch": 2, "micro_batch": 1, "epochs": 1, "steps_per_epoch": 1, "pairs": 4}


def silent(text: str) -> None:
    """Say nothing."""


@pytest.fixture
def written(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CensusConfig:
    """A configuration whose every path is relative to the directory at hand."""
    os.symlink(tiny_world.folder, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    text = json.dumps(tiny_world.settings).replace(f"{tiny_world.folder}/", "world/")
    return parse_config({**json.loads(text), "out": "runs/a"})


@pytest.fixture
def moved_in(reduced_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in, with a reduced run in `runs/a` that knows its index by a relative path only."""
    shutil.copytree(reduced_run, tmp_path / "runs/a")
    manifest = json.loads((tmp_path / "runs/a/run.json").read_text())
    manifest["index"]["path"] = "runs/a/index"  # as older versions wrote it
    manifest["config"]["out"] = "runs/a"
    (tmp_path / "runs/a/run.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_relative_path_is_left() -> None:
    config = parse_config({**PATHS, "out": "runs/x"})
    assert len(list(relative_paths(config))) == 13
    opened = Places("/work", "/work/runs/x").opened(config)
    assert not list(relative_paths(opened))
    assert opened.out == "/work/runs/x"
    assert opened.prompts.paths == ["/work/data/prompts.csv", "s3://b/p.csv"]
    assert opened.index.source == "/images"


def test_every_path_of_the_configuration_is_known() -> None:
    """A key that is added to the configuration and holds a path must be added here too."""

    def paths(schema: dict[str, Any]) -> set[str]:
        words = ("path", "paths", "source", "root", "switches", "file", "folder")
        return {
            f"{name}.{key}"
            for name, section in schema["$defs"].items()
            for key in section.get("properties", {})
            if key.rpartition("_")[2] in words and key != "threshold_source"
        }

    assert paths(CensusConfig.model_json_schema()) == {
        "PromptsConfig.paths",
        "GeneratorConfig.path",
        "GeneratorConfig.switches",
        "LoraConfig.path",
        "InversionConfig.path",
        "SegmenterConfig.path",
        "EmbedderConfig.path",
        "IndexConfig.path",
        "IndexConfig.source",
        "IndexConfig.image_root",
        "ClustersConfig.path",
    }


def test_a_run_is_found_from_another_directory(written: CensusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(written)
    here = Path.cwd()
    monkeypatch.chdir("/")
    run = Run.load(str(here / "runs/a"))
    config = run.config()
    assert config.generator.path == str(here / "world/checkpoint")
    assert config.prompts.paths == [str(here / "world/prompts.csv")]
    assert Path(config.index.source or "").is_file()
    # The identity, and so the fingerprint, is of the configuration as it was written.
    assert run.manifest["identity"]["generator.path"] == '"world/checkpoint"'
    assert "inputs.world/prompts.csv" in run.manifest["identity"]


def test_a_run_is_resumed_by_another_spelling_of_its_paths(
    written: CensusConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memscan.prompts.table import read_prompts

    first = open_run(written)
    first.write_prompts(read_prompts(written.prompts), 6)
    spelled = first.config()
    monkeypatch.chdir("/")
    assert open_run(spelled).manifest["fingerprint"] == first.manifest["fingerprint"]
    other = spelled.model_copy(update={"generator": spelled.generator.model_copy(update={"steps": 3})})
    with pytest.raises(RunError, match=r"generator\.steps"):
        open_run(other)


def test_another_file_is_still_another_run(written: CensusConfig, tmp_path: Path) -> None:
    from memscan.prompts.table import read_prompts

    open_run(written).write_prompts(read_prompts(written.prompts), 6)
    (tmp_path / "other.csv").write_text("caption\nx\n")
    prompts = written.prompts.model_copy(update={"paths": ["other.csv"]})
    with pytest.raises(RunError, match=r"prompts\.paths"):
        open_run(written.model_copy(update={"prompts": prompts}))


def test_what_lies_in_the_run_folder_moves_with_it(written: CensusConfig, tmp_path: Path) -> None:
    index = written.index.model_copy(update={"path": "runs/a/index"})
    run = open_run(written.model_copy(update={"index": index}))
    assert run.manifest["config"]["index"]["path"] == f"{INSIDE}index"
    assert run.manifest["config"]["out"] == INSIDE
    (tmp_path / "runs/a").rename(tmp_path / "b")
    moved = Run.load("b").config()
    assert (moved.out, moved.index.path) == (str(tmp_path / "b"), str(tmp_path / "b/index"))


@given(st.lists(st.sampled_from(["a", "b", "..", ".", "runs", "x"]), min_size=1, max_size=5))
def test_kept_paths_open_to_themselves(parts: list[str]) -> None:
    places, path = Places("/w/d", "/w/runs/x"), "/".join(parts)
    assert places.open(places.keep(path)) == places.open(path)
    assert os.path.isabs(places.open(path))
    kept = places.keep(path)
    if kept.startswith(INSIDE):
        moved = Places("/elsewhere", "/new/place").open(kept)
        assert moved == "/new/place" or moved.startswith("/new/place/")


def test_a_hub_id_is_no_path(tmp_path: Path) -> None:
    config = parse_config({**PATHS, "generator": {"path": "org/model", "revision": "0" * 40}})
    assert Places(str(tmp_path), str(tmp_path / "r")).opened(config).generator.path == "org/model"
    (tmp_path / "org/model").mkdir(parents=True)
    assert Places(str(tmp_path), str(tmp_path / "r")).opened(config).generator.path == str(tmp_path / "org/model")


def test_results_are_local() -> None:
    assert local_folder("x/../y") == Path(absolute("y"))
    with pytest.raises(MemscanError, match="local folder"):
        local_folder("s3://bucket/verified")


def test_verify_and_locality_of_a_relative_run(moved_in: Path, tiny_world: TinyWorld, alone: Alone) -> None:
    shutil.copytree(tiny_world.folder / "checkpoint", moved_in / "repaired")
    few = VerifySettings(
        panel=4, references=8, targets=2, attack_steps=2, attack_batch=2, draws=1, pictures=2, strata=2
    )
    result = verify("runs/a", "repaired", few, workers=1, say=silent)
    assert result["prompts"]["flagged"]["classes"]["after"]["VM"]["count"] == 4
    assert (moved_in / "runs/a/verified/repaired/verify.json").is_file()
    settings = LocalitySettings(starts=2, attack_steps=2, attack_batch=2, seeds=2, threshold_prompts=3, steps=4)
    found = evaluate_locality("runs/a", settings, workers=1, say=silent)
    assert len(found["images"]) == 2


@pytest.mark.parametrize("method", ["wanda", "dedup"])
def test_mitigation_of_a_relative_run(moved_in: Path, alone: Alone, method: str) -> None:
    settings = MitigationSettings(
        method=method, batch=2, micro_batch=1, epochs=1, steps_per_epoch=1, pairs=4, scope="all"
    )
    assert mitigate("runs/a", settings, "repaired", workers=1, say=silent)["method"] == method
    assert (moved_in / "repaired/model_index.json").is_file()


def test_finetune_of_a_relative_pruned_model(moved_in: Path, alone: Alone, nemo_c: Path) -> None:
    shutil.copytree(nemo_c, moved_in / "pruned")
    settings = MitigationSettings(method="finetune", pruned="pruned", searches=1, attack_steps=1, **SHORT)
    card = mitigate("runs/a", settings, workers=1, say=silent)
    assert card["method"] == "finetune"
    assert NEMO_C["method"] == "nemo_c"
    assert storage.exists("runs/a/mitigated/finetune/model_index.json")


def test_content_of_a_run_is_spelled_as_written(written: CensusConfig) -> None:
    assert run_content(written)["segmenter.path"] == '"world/segmenter.onnx"'
