"""Broken checkpoints: one line that names the part and the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from memscan.config import GeneratorConfig
from memscan.errors import MemscanError, ModelError
from memscan.models.generator import Generator


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["epsilon"], tmp_path / "broken"))


def refusal(path: object, **settings: object) -> str:
    with pytest.raises(ModelError) as caught:
        Generator.load(GeneratorConfig.model_validate({"path": str(path), **settings}))
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    assert refusal(folder).startswith(f"{folder}: has no {part}/")


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    line = refusal(folder)
    assert Path(file).name in line
    assert str((folder / file).parent) in line


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_weights(folder: Path, file: str, length: int) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:length])
    assert f"{folder / file}: not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json"])
def test_damaged_json(folder: Path, file: str) -> None:
    (folder / file).write_text('{"a": ')
    line = refusal(folder)
    assert str(folder) in line
    assert Path(file).parts[0].removesuffix(".json") in line


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_missing_tensor_is_not_replaced_by_noise(folder: Path, file: str) -> None:
    tensors = load_file(folder / file)
    lost = sorted(tensors)[3]
    tensors.pop(lost)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    line = refusal(folder)
    assert "weights do not fit config.json: 1 missing" in line
    assert str((folder / file).parent) in line


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert "only safetensors weights are loaded" in refusal(folder)


def test_another_kind_of_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "is a StableDiffusion3Pipeline" in refusal(folder)


def test_an_xl_folder_without_its_second_encoder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "has no text_encoder_2/" in refusal(folder)


def test_another_kind_of_prediction(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    assert "prediction type 'sample'" in refusal(folder)


def test_unknown_scheduler_names_the_nearest(folder: Path) -> None:
    line = refusal(folder, scheduler="EulerDiscretScheduler")
    assert "no scheduler 'EulerDiscretScheduler'" in line
    assert "EulerDiscreteScheduler" in line


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_unsuited_scheduler(folder: Path, name: str) -> None:
    assert f"{name} does not sample reproducibly" in refusal(folder, scheduler=name)


def test_image_size_that_the_vae_cannot_make(folder: Path) -> None:
    assert "60x64 is not a multiple of the VAE's 8" in refusal(folder, height=60)


def test_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ModelError, match="cuda:99"):
        Generator.load(GeneratorConfig(path=str(folder)), "cuda:99")


def test_no_such_folder_and_nothing_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for path in (str(tmp_path / "nowhere"), "some-org/some-model"):
        assert f"{path}: no such model folder" in refusal(path)
    with pytest.raises(MemscanError, match="gs:// needs gcsfs"):
        Generator.load(GeneratorConfig(path="gs://bucket/model"))


COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_pinned_hub_id_is_fetched_at_its_revision(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, make_generator: Callable[..., Generator]
) -> None:
    import huggingface_hub

    calls = []

    def fetch(hub_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        calls.append((hub_id, revision))
        assert not any("bin" in pattern or "ckpt" in pattern for pattern in allow_patterns)
        return str(checkpoints["epsilon"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match="revision 'main' can move"):
        Generator.load(GeneratorConfig(path="some-org/some-model", revision="main"))
    assert not calls
    generator = Generator.load(GeneratorConfig(path="some-org/some-model", revision=COMMIT))
    assert calls == [("some-org/some-model", COMMIT)]
    assert generator.spec.name == "some-model"
    assert generator.spec.sha256 == make_generator().spec.sha256


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    told = refusal("some-org/some-model", revision=COMMIT)
    assert f"cannot fetch revision {COMMIT} (OSError: no route to host)" in told


def test_older_tokenizer_files(folder: Path, checkpoints: dict[str, Path]) -> None:
    """vocab.json and merges.txt, as Stable Diffusion 1.x ships them, make the same tokens as tokenizer.json."""
    new = Generator.load(GeneratorConfig(path=str(folder)))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(checkpoints["epsilon"].parent / "written_tokenizer" / name, folder / "tokenizer" / name)
    old = Generator.load(GeneratorConfig(path=str(folder)))
    texts = ["The cat & the  dog 猫", "", "naïve café 123"]
    assert new.checkpoint.tokenizer(texts).input_ids == old.checkpoint.tokenizer(texts).input_ids
    (folder / "tokenizer" / "merges.txt").unlink()
    assert "neither tokenizer.json nor vocab.json with merges.txt" in refusal(folder)


def test_names_of_older_checkpoints(folder: Path, make_generator: Callable[..., Generator]) -> None:
    """Stable Diffusion 1.x files name the VAE's attention and the text encoder's weights in older ways."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    assert any(new in name for name in tensors for new in older)
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    older_files = Generator.load(make_generator().config.model_copy(update={"path": str(folder)}))
    ours, theirs = (generator.generate(["the cat"], [1]) for generator in (make_generator(), older_files))
    np.testing.assert_array_equal(ours.images_BHWC, theirs.images_BHWC)
