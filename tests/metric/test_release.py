"""The release variant against torchmetrics on canvases that Pillow makes, as the released scripts do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as stock

from memscan.config import MetricConfig
from memscan.metric import load_metric
from memscan.planted.renderer import Scene, random_background, random_object, render
from memscan.records import Label

METRIC = load_metric(MetricConfig(variant="release", canvas=176))
Picture = tuple[np.ndarray, np.ndarray]


def _picture(seed: int) -> Picture:
    rng = np.random.default_rng(seed)
    image, mask = render(Scene(random_object(rng), random_background(rng)))
    return image, np.clip(mask * 0.9, 0, 1).astype(np.float32)  # soft everywhere: m and its square differ


def _tensor(image: Image.Image) -> torch.Tensor:
    resized = image.resize((176, 176), Image.Resampling.LANCZOS).convert("RGBA")
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None].float() / 255


def _cut(picture: Picture, *, alpha: bool) -> torch.Tensor:
    """The foreground as background removal writes it; a generation's loses its alpha."""
    own = Image.fromarray(picture[0]).convert("RGBA")
    mask = Image.fromarray(np.rint(picture[1] * 255).astype(np.uint8))
    cut = Image.composite(own, Image.new("RGBA", own.size, 0), mask)
    return _tensor(cut if alpha else cut.convert("RGB"))


def _filled(picture: Picture) -> torch.Tensor:
    mask = picture[1][..., None]
    return _tensor(Image.fromarray(np.rint((1 - mask) * picture[0] + mask**2 * 255).astype(np.uint8)))


def _score(a: Picture, b: Picture) -> tuple[float, float]:
    (scores,) = METRIC.score(METRIC.prepare(*a), [METRIC.prepare(*b)])
    return scores.foreground, scores.background


@pytest.mark.parametrize(("one", "other"), [(1, 2), (3, 3), (4, 5)])
def test_scores_equal_torchmetrics_without_a_data_range(one: int, other: int) -> None:
    a, b = _picture(one), _picture(other)
    expected = (stock(_cut(a, alpha=False), _cut(b, alpha=True)), stock(_filled(a), _filled(b)))
    # 8-bit rounding of the cut differs by at most one step between Pillow's composite and ours.
    assert _score(a, b) == pytest.approx([float(value) for value in expected], abs=2e-3)


def test_a_copy_of_a_small_object_is_compared_with_the_training_background() -> None:
    """As in the scripts, whose foreground score of such a pair is low although the images are one."""
    image = _picture(1)[0]
    tiny, small = (np.zeros(image.shape[:2], np.float32) for _ in range(2))
    tiny[:9, :9], small[:15, :15] = 1, 1
    (scores,) = METRIC.score(METRIC.prepare(image, tiny), [METRIC.prepare(image, small)])
    assert scores.copied == ("foreground",)
    expected = stock(_cut((image, tiny), alpha=False), _filled((image, small)))
    assert scores.foreground == pytest.approx(float(expected), abs=1e-4)
    assert scores.foreground < 0.8 < scores.background
    assert METRIC.classify(scores) is Label.BM
