"""`memscan config init`: a first configuration for what is there, and one line for what cannot be understood."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from memscan.config import load_config
from memscan.planted.world import shipped_world
from pipelines.cli import app
from pipelines.starting import _text

WORLD = shipped_world()
MODEL, PROMPTS, IMAGES = (str(WORLD / name) for name in ("checkpoint", "prompts.csv", "references.parquet"))


def init(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["config", "init", *arguments])
    return result.exit_code, result.stderr


def test_what_is_there_is_in_the_file(tmp_path: Path) -> None:
    out = tmp_path / "census.yaml"
    files = ["--segmenter", str(WORLD / "segmenter.onnx"), "--embedder", str(WORLD / "embedder.pt")]
    assert init(MODEL, PROMPTS, IMAGES, "--out", str(out), *files) == (0, "")
    config, shipped = load_config(out), load_config(WORLD / "census.yaml")
    assert (config.prompts.paths, config.prompts.caption_column) == ([PROMPTS], "caption")
    assert (config.generator.path, config.index.source) == (MODEL, IMAGES)
    assert config.segmenter.sha256 == shipped.segmenter.sha256
    assert config.embedder.sha256 == shipped.embedder.sha256
    text = out.read_text(encoding="utf-8")
    assert "64 x 64 pixels" in text
    assert "3,019 of them" in text
    assert "TO BE FILLED IN" not in text
    code, line = init(MODEL, PROMPTS, IMAGES, "--out", str(out))
    assert (code, "is there already" in line) == (2, True)


def test_files_and_folders_with_what_is_to_be_filled_in(tmp_path: Path) -> None:
    prompts, images = tmp_path / "my prompts #1", tmp_path / "images"
    prompts.mkdir()
    images.mkdir()
    (prompts / "a.txt").write_text("a red ball\n")
    (prompts / "b.csv").write_text("alt\na blue ball\n")
    Image.new("RGB", (8, 8)).save(images / "one.png")
    out = tmp_path / "census.yaml"
    code, said = init(MODEL, str(prompts), str(images), "--out", str(out))
    assert code == 0
    assert "fill in segmenter and embedder" in said
    config = load_config(out)
    assert (config.prompts.paths, config.prompts.caption_column) == ([str(prompts)], None)
    assert out.read_text(encoding="utf-8").count("TO BE FILLED IN") == 4


def test_what_cannot_be_understood_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("caption\n")
    (tmp_path / "columns.csv").write_text("one,two\n1,2\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "none").mkdir()
    broken = shutil.copytree(MODEL, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    (tmp_path / "single.safetensors").write_bytes(b"no header")
    video = tmp_path / "video"
    video.mkdir()
    (video / "model_index.json").write_text(json.dumps({"_class_name": "TextToVideoPipeline"}))
    out = tmp_path / "census.yaml"
    for model, prompts, images, message in (
        (str(WORLD), PROMPTS, IMAGES, "there is one in checkpoint"),
        (str(tmp_path / "nowhere"), PROMPTS, IMAGES, "nowhere"),
        (str(tmp_path / "single.safetensors"), PROMPTS, IMAGES, "single.safetensors"),
        (str(tmp_path / "none"), PROMPTS, IMAGES, "none"),
        (str(broken), PROMPTS, IMAGES, "diffusion_pytorch_model.safetensors"),
        (str(video), PROMPTS, IMAGES, "makes no image from a text"),
        (MODEL, str(tmp_path / "empty.csv"), IMAGES, "empty"),
        (MODEL, str(tmp_path / "columns.csv"), IMAGES, "caption"),
        (MODEL, str(tmp_path / "blank.txt"), IMAGES, "no usable caption"),
        (MODEL, PROMPTS, str(tmp_path / "none"), "neither images"),
        (MODEL, PROMPTS, PROMPTS, "prompts.csv"),
    ):
        code, said = init(model, prompts, images, "--out", str(out))
        assert (code, said.count("\n")) == (2, 1), said
        assert message in said
        assert not out.exists()
    code, said = init(MODEL, PROMPTS, IMAGES, "--out", str(out), "--segmenter", str(tmp_path / "no.onnx"))
    assert (code, "no such model file" in said) == (2, True)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1).filter(str.isprintable))
def test_any_name_of_a_file_comes_back_from_the_file(name: str) -> None:
    import yaml

    assert yaml.safe_load(f"a: {_text(name)} # note\nb: [{_text(name)}]") == {"a": name, "b": [name]}


@pytest.mark.parametrize("nightly", [False, True])
def test_the_schema_is_printed(nightly: bool) -> None:
    result = CliRunner().invoke(app, ["config", "schema", *(["--nightly"] if nightly else [])])
    assert result.exit_code == 0
    assert ("watch" in json.loads(result.stdout)["properties"]) == nightly
