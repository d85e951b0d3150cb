"""Instruments are asked about two images before they judge; presets read a model as rembg does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from memscan.config import EmbedderConfig, SegmenterConfig
from memscan.errors import ModelError
from memscan.models.embedder import load_embedder
from memscan.models.embedder import prepare as prepare_pixels
from memscan.models.mask_rules import rule_of
from memscan.models.probe import probe_embedder, probe_segmenter, scenes
from memscan.models.segmenter import load_segmenter, mask_of, prepare
from memscan.models.specification import ModelSpec
from memscan.planted.world import world_config
from tests.models.test_embedder import write_torchscript

SIDE = 32


def graph_model(
    path: Path, nodes: list[Any], outputs: dict[str, int], batch: int | str = "n", constants: Sequence[Any] = ()
) -> SegmenterConfig:
    """An ONNX file from `x` [n, 3, 32, 32] to outputs by name with their numbers of channels."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, channels, SIDE, SIDE])
            for name, channels in outputs.items()
        ],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return SegmenterConfig(path=str(path), size=SIDE)


BRIGHT = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1)
DARK = helper.make_node("Neg", ["y"], ["z"])
FIRST = numpy_helper.from_array(np.array([0], dtype=np.int64), "first")


def probed(config: SegmenterConfig) -> None:
    probe_segmenter(load_segmenter(config), config.path)


def test_a_mask_of_what_is_bright_passes(tmp_path: Path) -> None:
    probed(graph_model(tmp_path / "m.onnx", [BRIGHT], {"y": 1}))
    probed(graph_model(tmp_path / "m.onnx", [BRIGHT], {"y": 1}, batch=1))


def test_the_shipped_instruments_pass() -> None:
    config = world_config()
    probed(config.segmenter)
    probe_embedder(load_embedder(config.embedder), config.embedder.path)


def test_two_classes_are_no_mask(tmp_path: Path) -> None:
    both = helper.make_node("Concat", ["z", "y"], ["c"], axis=1)
    config = graph_model(tmp_path / "m.onnx", [BRIGHT, DARK, both], {"c": 2})
    with pytest.raises(ModelError, match=r"gives \['n', 2, 32, 32\], not a mask"):
        load_segmenter(config)


def test_of_several_outputs_the_last_counts_or_the_one_that_is_named(tmp_path: Path) -> None:
    config = graph_model(tmp_path / "m.onnx", [BRIGHT, DARK], {"z": 1, "y": 1})
    probed(config)
    first = SegmenterConfig(path=config.path, size=SIDE, preset="custom", output=0)
    with pytest.raises(ModelError, match="leaves out a plain object"):
        probed(first)
    with pytest.raises(ModelError, match="has 2 outputs"):
        load_segmenter(first.model_copy(update={"output": 2}))


def test_an_inverted_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leaves out a plain object"):
        probed(graph_model(tmp_path / "m.onnx", [BRIGHT, DARK], {"z": 1}))


def test_a_batch_that_answers_with_the_first_image(tmp_path: Path) -> None:
    """The batch is declared dynamic, and every image gets the first one's mask."""
    nodes = [
        BRIGHT,
        helper.make_node("Gather", ["y", "first"], ["one"], axis=0),
        helper.make_node("Sub", ["y", "y"], ["zero"]),
        helper.make_node("Add", ["zero", "one"], ["out"]),
    ]
    config = graph_model(tmp_path / "m.onnx", nodes, {"out": 1}, constants=[FIRST])
    with pytest.raises(ModelError, match=r"different masks for two images together.*segmenter.batch_size to 1"):
        probed(config)
    probed(config.model_copy(update={"batch_size": 1}))


def test_a_batch_that_fails(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([1, 1, SIDE, SIDE], dtype=np.int64), "shape")
    nodes = [BRIGHT, helper.make_node("Reshape", ["y", "shape"], ["out"])]
    config = graph_model(tmp_path / "m.onnx", nodes, {"out": 1}, constants=[shape])
    with pytest.raises(ModelError, match=r"cannot segment 2 images at once.*segmenter.batch_size to 1"):
        probed(config)
    probed(config.model_copy(update={"batch_size": 1}))


def test_a_static_batch_is_refused_by_its_signature(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes exactly 4 images at once"):
        load_segmenter(graph_model(tmp_path / "m.onnx", [BRIGHT], {"y": 1}, batch=4))


def test_a_constant_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="two different images the same mask"):
        probed(graph_model(tmp_path / "m.onnx", [BRIGHT, helper.make_node("Sub", ["y", "y"], ["z"])], {"z": 1}))


def test_weights_in_another_file_are_named(tmp_path: Path) -> None:
    gain = numpy_helper.from_array(np.ones((1, 1, SIDE, SIDE), dtype=np.float32), "gain")
    path = tmp_path / "m.onnx"
    graph_model(path, [BRIGHT, helper.make_node("Mul", ["y", "gain"], ["z"])], {"z": 1}, constants=[gain])
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    with pytest.raises(ModelError, match=r"weights in another file.*onnx\.save"):
        load_segmenter(SegmenterConfig(path=str(path), size=SIDE))


@pytest.mark.parametrize(
    ("preset", "mean", "std", "sigmoid"),
    [
        ("birefnet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
        ("isnet", (0.5, 0.5, 0.5), (1, 1, 1), False),
        ("u2net", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False),
    ],
)
def test_presets_are_rembgs_sessions(preset: Any, mean: Any, std: Any, sigmoid: bool, rng: np.random.Generator) -> None:
    """By hand: by the maximum, the session's means and deviations; the output to [0, 1] by min-max."""
    image = rng.integers(0, 200, (40, 50, 3), dtype=np.uint8)
    rule = rule_of(SegmenterConfig(path="x", preset=preset))
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)).astype(np.float64)
    expected = ((small / small.max() - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(prepare(image, SIDE, rule), expected, atol=1e-5)
    assert rule.sigmoid is sigmoid
    ramp = np.linspace(0.2, 0.6, 16, dtype=np.float32).reshape(4, 4)
    spread = np.floor((ramp - 0.2) / 0.4 * 255) / 255
    if not sigmoid:
        np.testing.assert_allclose(mask_of(ramp, (4, 4), sigmoid=False), spread, atol=1.01 / 255)


def test_presets_have_their_sizes_and_names() -> None:
    assert SegmenterConfig(path="x", preset="u2net").size == 320
    assert SegmenterConfig(path="x", preset="isnet").size == 1024
    with pytest.raises(ValueError, match="belongs to preset custom"):
        SegmenterConfig(path="x", preset="isnet", mean=(0.5, 0.5, 0.5))
    own = SegmenterConfig(path="x", preset="custom", mean=(0.5, 0.5, 0.5), std=(1, 1, 1), divide="255")
    assert rule_of(own).name == "custom-255-0.5_0.5_0.5_1_1_1-sigmoid-output-1-"


class Fake:
    """An embedder by a function of the batch."""

    def __init__(self, answer: Callable[[list[np.ndarray]], np.ndarray]) -> None:
        self.answer, self.spec, self.dimension = answer, ModelSpec("embedder", "e", "0", "p"), 3

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        vectors = np.asarray(self.answer(list(images)), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def mean_colour(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([image.reshape(-1, 3).mean(axis=0) for image in images])


def test_embedders() -> None:
    probe_embedder(Fake(mean_colour), "e")
    with pytest.raises(ModelError, match="same vector"):
        probe_embedder(Fake(lambda images: np.ones((len(images), 3))), "e")
    with pytest.raises(ModelError, match=r"different vectors for two images together.*embedder.batch_size to 1"):
        probe_embedder(Fake(lambda images: mean_colour([images[0]] * len(images))), "e")

    def square_only(images: list[np.ndarray]) -> np.ndarray:
        if images[0].shape[0] != images[0].shape[1]:
            raise RuntimeError("The size of tensor a (7) must match")
        return mean_colour(images)

    with pytest.raises(ModelError, match=r"cannot embed an image of another shape .*size of tensor.*resize to square"):
        probe_embedder(Fake(square_only), "e")


class FirstOnly(torch.nn.Module):
    """A batch that is built in: one vector, whatever comes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1].mean(dim=(2, 3))


def test_a_batch_that_is_built_into_torchscript(tmp_path: Path) -> None:
    embedder = load_embedder(write_torchscript(tmp_path / "e.pt", FirstOnly()))
    with pytest.raises(ModelError, match=r"gives \[1, 3\] for 2 images.*batch_size to 1"):
        embedder.embed(scenes()[0])
    one = load_embedder(write_torchscript(tmp_path / "e.pt", FirstOnly(), batch_size=1))
    probe_embedder(one, "e.pt")


@pytest.mark.parametrize(("kind", "error"), [(TensorProto.FLOAT, 1e-6), (TensorProto.FLOAT16, 2e-3)])
def test_an_onnx_embedder_gives_the_same_as_by_hand(tmp_path: Path, kind: int, error: float) -> None:
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", kind, ["n", 3])],
    )
    path = tmp_path / "e.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10).SerializeToString()
    )
    config = EmbedderConfig(kind="onnx", path=str(path), name="mean", size=48)
    embedder = load_embedder(config)
    probe_embedder(embedder, config.path)
    image = scenes()[0][0]
    expected = prepare_pixels(image, config).mean(axis=(1, 2))
    np.testing.assert_allclose(embedder.embed([image])[0], expected / np.linalg.norm(expected), atol=error)
    assert embedder.spec.name == "mean"
    mask = graph_model(tmp_path / "m.onnx", [BRIGHT], {"y": 1})
    with pytest.raises(ModelError, match=r"not one float32 or float16 \[N, 3, H, W\] and \[N, D\]"):
        load_embedder(config.model_copy(update={"path": mask.path}))
