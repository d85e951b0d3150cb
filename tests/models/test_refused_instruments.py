"""Segmenters and embedders that cannot be used are refused in one line that names the reason, never by a traceback."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from memscan.config import EmbedderConfig, SegmenterConfig
from memscan.errors import ModelError
from memscan.models.embedder import load_embedder
from memscan.models.segmenter import load_segmenter

SIDE = 32


def onnx_file(
    *, ir: int = 10, opset: int = 17, operator: str = "ReduceMean", domain: str = "", shape: tuple[Any, ...] = ()
) -> bytes:
    """The mean over the channels, or another operator; the shape of the output is only declared."""
    attributes = {"axes": [1], "keepdims": 0 if len(shape) == 3 else 1} if operator == "ReduceMean" else {}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape or ["n", 1, SIDE, SIDE])],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=ir).SerializeToString()
    return made


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ir": 99}, r"ONNX model \(Unsupported model IR version: 99, max .*older version of ONNX"),
        ({"opset": 99}, r"its opset is 99, and this onnxruntime knows \d+ and older.*older version of ONNX"),
        ({"operator": "Fancy", "domain": "com.acme"}, r"com\.acme:Fancy\(-1\) is not a registered"),
        ({"shape": ("n", SIDE, SIDE)}, r"gives \['n', 32, 32\], not a mask"),
    ],
)
def test_onnx_files(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    file = tmp_path / "segmenter.onnx"
    file.write_bytes(onnx_file(**changes))
    with pytest.raises(ModelError, match=line) as refused:
        load_segmenter(SegmenterConfig(path=str(file), size=SIDE))
    assert "\n" not in str(refused.value)
    assert "onnxruntime_src" not in str(refused.value)


class Several(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean(dim=(2, 3)), x


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": x.mean(dim=(2, 3))}


class Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)).reshape(1, -1)


class Half(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 4).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.mean(dim=(2, 3)))


def scripted(network: type[torch.nn.Module]) -> Callable[[Path], None]:
    return lambda path: torch.jit.script(network().eval()).save(str(path))


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (scripted(Several), r"gives a tuple, not a tensor \[N, D\]"),
        (scripted(Named), r"gives a dict, not a tensor \[N, D\]"),
        (scripted(Flat), r"gives \[1, 6\] for 2 images, not \[2, 3\].*embedder\.batch_size to 1"),
        (scripted(Half), r"cannot embed an image.*export it in float32 on the CPU"),
        (lambda path: torch.save({"fc": torch.zeros(3)}, path), r"weights alone\? SSCD's TorchScript files end in"),
        (lambda path: path.write_bytes(onnx_file()), r"an ONNX file is read with embedder\.kind: onnx"),
        (lambda path: path.write_bytes(b""), r"TorchScript files are zip archives"),
    ],
)
def test_torchscript_files(tmp_path: Path, write: Callable[[Path], Any], line: str) -> None:
    file = tmp_path / "embedder.pt"
    write(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    config = EmbedderConfig(path=str(file), sha256=digest, name="e", resize="square", size=SIDE)
    images = [np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 99, np.uint8)]
    with pytest.raises(ModelError, match=line) as refused:
        load_embedder(config).embed(images)
    assert "\n" not in str(refused.value)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}


def folder_of(path: Path, name: str, **settings: Any) -> Path:
    """A tiny image encoder of transformers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name.removesuffix('Model')}Config")(**settings)
    getattr(transformers, name)(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Dinov2Model", SMALL),
        ("SiglipVisionModel", {**SMALL, "intermediate_size": 32}),
        ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    ],
)
def test_image_encoders_of_transformers(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "encoder", name, **settings)
    embedder = load_embedder(EmbedderConfig(kind="transformers", path=str(folder), resize="square", size=SIDE))
    images = list(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))
    vectors_ND = embedder.embed(images)
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([embedder.embed([one]) for one in images]), vectors_ND, atol=1e-5)
    assert np.abs(vectors_ND[0] - vectors_ND[1]).max() > 1e-4


def test_folders_that_are_no_image_encoders(tmp_path: Path) -> None:
    def refused(folder: Path, line: str) -> None:
        with pytest.raises(ModelError, match=line) as caught:
            load_embedder(EmbedderConfig(kind="transformers", path=str(folder), resize="square", size=SIDE))
        assert "\n" not in str(caught.value)

    masked = folder_of(tmp_path / "mae", "ViTMAEModel", **SMALL, intermediate_size=32)
    refused(masked, "has neither image_embeds nor pooler_output")
    (masked / "model.safetensors").rename(masked / "pytorch_model.bin")
    refused(masked, "only safetensors weights are loaded")
    words = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    refused(folder_of(tmp_path / "bert", "BertModel", **words, vocab_size=20), "cannot embed an image of shape")
