"""The inputs of the comparisons with the authors' code, made from seeds: both sides see the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from memscan.planted.renderer import Scene, random_background, random_object, render

SIDE = 512

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Cut:
    """image_HWC uint8 RGB and alpha_HW uint8, its mask, as a segmenter of rembg gives it."""

    image_HWC: Pixels
    alpha_HW: Pixels


@dataclass(frozen=True)
class CutPair:
    """A generation of 512 px and a training image, cut."""

    name: str
    generated: Cut
    reference: Cut


def cut_pairs() -> list[CutPair]:
    """Pairs for FB-Mem: copies, shared regions, unrelated pictures, and every degenerate rule."""
    one, other, third = (_scene(seed) for seed in (1, 2, 3))
    soft = Cut(one.image_HWC, np.rint(one.alpha_HW * 0.9).astype(np.uint8))
    return [
        CutPair("a copy", one, one),
        CutPair("a copy with a soft mask", soft, soft),
        CutPair("unrelated", one, other),
        CutPair("unrelated, of other sizes", third, _shrunk(other, 300, 420)),
        CutPair("another background", Cut(_on(one, other), one.alpha_HW), one),
        CutPair("little foreground in the generation", _small(one, 0.02), _small(one, 0.05)),
        CutPair("little foreground in the training image", _small(one, 0.05), _small(one, 0.02)),
        CutPair("little background in the generation", _large(one, 0.02), _large(one, 0.1)),
        CutPair("little background in the training image", _large(one, 0.1), _large(one, 0.02)),
        CutPair("no foreground in either", _small(one, 0.0), _small(other, 0.0)),
    ]


def mask_image() -> Pixels:
    """A small picture whose brightest pixel is not white, so that a division by its maximum is seen."""
    return _shrunk(_scene(4), 20, 28).image_HWC // 2 + 20


def small_network(*, logits: bool, side: int) -> bytes:
    """An ONNX file in the format of rembg's models: a weighted sum of the channels, with a sigmoid unless `logits`."""
    from onnx import TensorProto, helper, numpy_helper

    kernel = numpy_helper.from_array(np.array([0.9, -1.3, 0.7], np.float32).reshape(1, 3, 1, 1), "kernel")
    last = helper.make_node("Identity" if logits else "Sigmoid", ["score"], ["mask"])
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "kernel"], ["score"]), last],
        "segmenter",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 1, side, side])],
        [kernel],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())


def attention_case() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Attention of 50 calls, 5 layers, 6 prompts and 9 tokens, each row summing to 1; and where captions end."""
    rng = np.random.default_rng(8)
    shares = rng.dirichlet(np.full(9, 0.7), (50, 5, 6))
    return np.maximum(shares, 1e-9), np.array([3, 4, 5, 6, 7, 8])


def _scene(seed: int) -> Cut:
    rng = np.random.default_rng(seed)
    image, mask = render(Scene(random_object(rng), random_background(rng)))
    picture = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(np.rint(mask * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    grain = rng.normal(0, 6, (SIDE, SIDE, 3))
    return Cut(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8), np.asarray(alpha))


def _on(one: Cut, other: Cut) -> Pixels:
    """The object of one before the background of the other."""
    alpha_HW1 = one.alpha_HW[..., None] / 255
    return np.rint(alpha_HW1 * one.image_HWC + (1 - alpha_HW1) * other.image_HWC).astype(np.uint8)


def _shrunk(cut: Cut, height: int, width: int) -> Cut:
    return Cut(*(np.asarray(Image.fromarray(part).resize((width, height))) for part in (cut.image_HWC, cut.alpha_HW)))


def _small(cut: Cut, share: float) -> Cut:
    """The same image, of which a square of this share is the foreground."""
    alpha_HW = np.zeros((SIDE, SIDE), np.uint8)
    side = round(SIDE * share**0.5)
    alpha_HW[100 : 100 + side, 150 : 150 + side] = 255
    return Cut(cut.image_HWC, alpha_HW)


def _large(cut: Cut, share: float) -> Cut:
    """The same image, of which all but a square of this share is the foreground."""
    return Cut(cut.image_HWC, 255 - _small(cut, share).alpha_HW)
