"""The segmenter against a hand computation of rembg's path, on small ONNX graphs in birefnet-general's format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from memscan.config import SegmenterConfig
from memscan.errors import ConfigError, IntegrityError, ModelError, Reason, RowReject
from memscan.models.segmenter import load_segmenter, mask_of

WEIGHTS = np.array([0.9, -1.3, 0.7], dtype=np.float32)
BIAS = np.float32(0.25)
SIDE = 32

NaturalImage = Callable[[int, int, int], np.ndarray]


def write_model(
    path: Path,
    *,
    batch: int | str = "batch",
    side: int | str = SIDE,
    weights: np.ndarray = WEIGHTS,
    operator: str = "Identity",
    channels: int = 3,
    kind: int = TensorProto.FLOAT,
) -> SegmenterConfig:
    """logits = operator(w . pixel + b) at each pixel."""
    element = helper.tensor_dtype_to_np_dtype(kind)
    kernel = numpy_helper.from_array(weights.reshape(1, channels, 1, 1).astype(element), "kernel")
    bias = numpy_helper.from_array(np.array([BIAS], dtype=element), "bias")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input_image", "kernel", "bias"], ["score"]),
            helper.make_node(operator, ["score"], ["output_image"]),
        ],
        "segmenter",
        [helper.make_tensor_value_info("input_image", kind, [batch, channels, side, side])],
        [helper.make_tensor_value_info("output_image", kind, [batch, 1, side, side])],
        [kernel, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return SegmenterConfig(
        path=str(path), size=SIDE, batch_size=3, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )


def by_hand(image: np.ndarray) -> np.ndarray:
    """rembg's birefnet-general session, step by step in float64."""
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)).astype(np.float64)
    small /= small.max()
    small = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    probability = 1 / (1 + np.exp(-(small @ WEIGHTS.astype(np.float64) + BIAS)))
    probability = (probability - probability.min()) / (probability.max() - probability.min())
    height, width = image.shape[:2]
    mask = Image.fromarray((probability * 255).astype(np.uint8)).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(mask) / 255


@pytest.fixture
def images(natural_image: NaturalImage) -> list[np.ndarray]:
    sizes = [(64, 64), (40, 90), (32, 32), (101, 33), (64, 64)]
    made = [natural_image(seed, *size) for seed, size in enumerate(sizes)]
    made[4] = made[4] // 3  # dark: the division by the image's own maximum matters
    return made


def assert_masks(masks: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> None:
    assert len(masks) == len(images)
    for mask, image in zip(masks, images, strict=True):
        assert mask.dtype == np.float32
        assert mask.shape == image.shape[:2]
        # A probability on the edge of two of the 256 levels may fall on either side in float32.
        np.testing.assert_allclose(mask, by_hand(image), atol=1.5 / 255)
        assert np.abs(mask - by_hand(image)).mean() < 1e-3


@pytest.mark.parametrize("batch", ["batch", 1])
def test_masks_as_computed_by_hand(tmp_path: Path, images: list[np.ndarray], batch: int | str) -> None:
    segmenter = load_segmenter(write_model(tmp_path / "model.onnx", batch=batch), "cpu")
    assert_masks(segmenter.segment(images), images)
    assert segmenter.segment([]) == []


def test_masks_survive_eight_bits(tmp_path: Path, images: list[np.ndarray]) -> None:
    mask = load_segmenter(write_model(tmp_path / "model.onnx")).segment(images[1:2])[0]
    np.testing.assert_array_equal(np.round(mask * 255).astype(np.uint8) / np.float32(255), mask)
    assert mask.min() >= 0
    assert mask.max() <= 1


def test_batches_as_configured(tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter: Any = load_segmenter(write_model(tmp_path / "model.onnx"))
    inner, sizes = segmenter._session, []

    class Counting:
        def run(self, outputs: Any, feed: dict[str, np.ndarray]) -> Any:
            sizes.append(len(feed["input_image"]))
            return inner.run(outputs, feed)

    monkeypatch.setattr(segmenter, "_session", Counting())
    assert_masks(segmenter.segment(images), images)
    assert sizes == [3, 2]


def test_a_model_of_any_size_runs_at_the_configured_one(tmp_path: Path, images: list[np.ndarray]) -> None:
    assert_masks(load_segmenter(write_model(tmp_path / "model.onnx", side="side")).segment(images), images)


def test_a_black_image_and_a_constant_map(tmp_path: Path) -> None:
    segmenter = load_segmenter(write_model(tmp_path / "model.onnx", weights=np.zeros(3, np.float32)))
    masks = segmenter.segment([np.zeros((20, 30, 3), np.uint8)])
    np.testing.assert_array_equal(masks[0], np.ones((20, 30), np.float32))  # the bias alone: probability above a half


@pytest.mark.parametrize(("logit", "expected"), [(-3.0, 0.0), (-1e-3, 0.0), (0.0, 1.0), (200.0, 1.0), (-1e30, 0.0)])
def test_constant_maps_are_all_or_nothing(logit: float, expected: float) -> None:
    np.testing.assert_array_equal(mask_of(np.full((8, 8), logit), (5, 7)), np.full((5, 7), expected, np.float32))


def test_extreme_logits_do_not_overflow() -> None:
    logits = np.array([[-1e30, -50.0], [50.0, 1e30]], dtype=np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        np.testing.assert_array_equal(mask_of(logits, (2, 2)), [[0, 0], [1, 1]])


def test_output_that_is_not_finite_rejects_the_row(tmp_path: Path, images: list[np.ndarray]) -> None:
    segmenter = load_segmenter(write_model(tmp_path / "model.onnx", operator="Log"))
    with pytest.raises(RowReject) as caught:
        segmenter.segment(images[:1])
    assert caught.value.reason is Reason.SEGMENTATION_FAILED


def test_specification(tmp_path: Path) -> None:
    config = write_model(tmp_path / "birefnet-general.onnx")
    assert config.sha256 is not None
    assert load_segmenter(config).spec.id == f"segmenter:birefnet-general.onnx@{config.sha256[:12]}:rembg{SIDE}"


def test_wrong_hash_is_refused_before_parsing(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not an onnx file")
    with pytest.raises(IntegrityError, match="sha256"):
        load_segmenter(SegmenterConfig(path=str(path), sha256="0" * 64))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="not a loadable ONNX model"):
        load_segmenter(SegmenterConfig(path=str(path), sha256=digest.upper()))
    with pytest.raises(ModelError, match="no such model file"):
        load_segmenter(SegmenterConfig(path=str(tmp_path / "none.onnx")))


def test_a_size_other_than_the_models(tmp_path: Path) -> None:
    config = write_model(tmp_path / "model.onnx").model_copy(update={"size": 64})
    with pytest.raises(ModelError, match=r"takes images of 32x32, configured are 64x64.*set segmenter.size to 32"):
        load_segmenter(config)


def test_a_model_of_one_channel(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not one float32 or float16 \[N, 3, S, S\]"):
        load_segmenter(write_model(tmp_path / "model.onnx", channels=1, weights=WEIGHTS[:1]))


@pytest.mark.parametrize("kinds", [(), (TensorProto.UINT8,), (TensorProto.FLOAT, TensorProto.FLOAT)])
def test_a_model_with_other_inputs(tmp_path: Path, kinds: tuple[int, ...]) -> None:
    one = numpy_helper.from_array(np.ones((1, 1, SIDE, SIDE), dtype=np.float32), "one")
    inputs = [helper.make_tensor_value_info(f"x{at}", kind, ["n", 3, SIDE, SIDE]) for at, kind in enumerate(kinds)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, SIDE, SIDE])
    graph = helper.make_graph([helper.make_node("Identity", ["one"], ["y"])], "g", inputs, [output], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"not one float32 or float16 \[N, 3, S, S\]"):
        load_segmenter(SegmenterConfig(path=str(tmp_path / "model.onnx"), size=SIDE))


@pytest.mark.parametrize("batch", ["batch", 1])
def test_a_model_of_half_precision(tmp_path: Path, images: list[np.ndarray], batch: int | str) -> None:
    """The file takes and gives float16: 11 bits of mantissa, so a mask may be a level of 8 bits or two away."""
    segmenter = load_segmenter(write_model(tmp_path / "model.onnx", batch=batch, kind=TensorProto.FLOAT16))
    for mask, image in zip(segmenter.segment(images), images, strict=True):
        assert (mask.dtype, mask.shape) == (np.float32, image.shape[:2])
        np.testing.assert_allclose(mask, by_hand(image), atol=3 / 255)


@pytest.mark.parametrize("allowed", [{}, {"trust_remote_code": True}, {"revision": "abc"}])
def test_remote_code_needs_consent_and_a_revision(allowed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="runs code from the model's repository"):
        load_segmenter(SegmenterConfig(kind="birefnet", path="ZhengPeng7/BiRefNet", **allowed))


REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class TinyConfig(PretrainedConfig):
    model_type = "tiny_birefnet"


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Conv2d(3, 1, 1)
        self.post_init()

    def forward(self, pixels):
        score = self.score(pixels)
        return [torch.zeros_like(score), score]
"""


def test_remote_code_model(tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as remote code and as ONNX make the same masks."""
    import transformers.dynamic_module_utils as dynamic
    from safetensors.torch import save_file

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "tiny_birefnet"
    folder.mkdir()
    (folder / "tiny_birefnet.py").write_text(REMOTE_CODE)
    (folder / "config.json").write_text(
        '{"model_type": "tiny_birefnet", "auto_map": {"AutoConfig": "tiny_birefnet.TinyConfig",'
        ' "AutoModelForImageSegmentation": "tiny_birefnet.Tiny"}}'
    )
    weights = {"score.weight": torch.tensor(WEIGHTS).reshape(1, 3, 1, 1), "score.bias": torch.tensor([float(BIAS)])}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = SegmenterConfig(
        kind="birefnet", path=str(folder), trust_remote_code=True, revision="main", size=SIDE, batch_size=2
    )
    segmenter = load_segmenter(config)
    assert_masks(segmenter.segment(images), images)
    assert segmenter.spec.preprocessing == load_segmenter(write_model(tmp_path / "model.onnx")).spec.preprocessing
    low = load_segmenter(config.model_copy(update={"dtype": "bfloat16"}))
    assert low.spec.preprocessing == f"{segmenter.spec.preprocessing}-bfloat16"
    for one, other in zip(low.segment(images), segmenter.segment(images), strict=True):
        assert 0 < np.abs(one - other).max() < 0.1  # 8 bits of mantissa, behind a sigmoid and a min-max
    facts = (folder / "config.json").read_text()
    (folder / "config.json").write_text(facts.replace('"tiny_birefnet.Tiny"', '"other/repository--tiny_birefnet.Tiny"'))
    with pytest.raises(ModelError, match="takes its code from another repository"):
        load_segmenter(config)
    (folder / "config.json").write_text(facts)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights file model\.safetensors"):
        load_segmenter(config)
