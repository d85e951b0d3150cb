"""SSIM and MS-SSIM against torchmetrics, and their algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage import data as skimage_data
from sklearn.datasets import load_sample_images
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as oracle_ms_ssim,
)
from torchmetrics.functional.image import structural_similarity_index_measure as oracle_ssim

from memscan.metric.ssim import combine_scales, ms_ssim, prepare_stack, scale_terms, ssim

SIDE = 176


def _tensor(image_HWC: np.ndarray, size: int = SIDE) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)[None].float() / 255
    return torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


@pytest.fixture(scope="module")
def natural() -> torch.Tensor:
    """Photographs (N, 3, 176, 176)."""
    pictures = [skimage_data.astronaut(), skimage_data.chelsea()]
    return torch.cat([_tensor(picture) for picture in [*pictures, *load_sample_images().images]])


def _oracle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return oracle_ms_ssim(a, b, data_range=1.0, reduction="none")


@pytest.mark.parametrize(
    ("size", "channels", "noise"), [((176, 176), 3, 0.02), ((177, 200), 4, 0.3), ((210, 191), 1, 1.0)]
)
def test_random_images_agree_with_torchmetrics(size: tuple[int, int], channels: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(channels)
    a = torch.rand(1, channels, *size, generator=generator)
    b = (a + noise * (torch.rand(a.shape, generator=generator) - 0.5)).clamp(0, 1)
    torch.testing.assert_close(ms_ssim(a, b), _oracle(a, b), atol=1e-4, rtol=0)
    torch.testing.assert_close(ssim(a, b), oracle_ssim(a, b, data_range=1.0, reduction="none"), atol=1e-4, rtol=0)


def test_natural_images_agree_with_torchmetrics(natural: torch.Tensor) -> None:
    shifted = torch.roll(natural, (1, 2), dims=(2, 3))
    others = torch.roll(natural, 1, dims=0)
    for other in (shifted, 0.7 * natural**1.5 + 0.3 * others):
        expected = _oracle(natural, other)
        torch.testing.assert_close(ms_ssim(natural, other), expected, atol=1e-4, rtol=0)
        assert 0.2 < float(expected.mean()) < 0.999  # real values are compared, not ends of the range
        torch.testing.assert_close(
            ssim(natural, other), oracle_ssim(natural, other, data_range=1.0, reduction="none"), atol=1e-4, rtol=0
        )


def test_inverted_image_scores_zero_as_in_torchmetrics(natural: torch.Tensor) -> None:
    image = natural[:1]
    assert float(_oracle(image, 1 - image)) == float(ms_ssim(image, 1 - image)) == 0.0


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
def test_offset_changes_nothing_but_rounding(natural: torch.Tensor, offset: float) -> None:
    a, b = natural[:1].double(), natural[1:2].double()
    offsets = torch.full((3,), offset, dtype=torch.float64)
    terms = scale_terms(prepare_stack(a, offset_C=offsets), [prepare_stack(b, offset_C=offsets)])
    torch.testing.assert_close(combine_scales(terms.mean(dim=2)), ms_ssim(a, b), atol=1e-12, rtol=0)


def test_batch_of_candidates_equals_one_by_one(natural: torch.Tensor) -> None:
    stacks = [prepare_stack(image[None]) for image in natural]
    together = scale_terms(stacks[0], stacks * 3)
    single = torch.cat([scale_terms(stacks[0], [stack]) for stack in stacks * 3])
    torch.testing.assert_close(together, single, atol=1e-6, rtol=0)


def test_small_images_wrong_shapes_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="176"):
        ms_ssim(torch.zeros(1, 3, 175, 300), torch.zeros(1, 3, 175, 300))
    with pytest.raises(ValueError, match="differ in shape"):
        ssim(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match="floating point"):
        ssim(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="different size"):
        scale_terms(prepare_stack(torch.zeros(1, 3, 176, 176)), [prepare_stack(torch.zeros(1, 3, 192, 192))])


images = hnp.arrays(np.float64, (1, 1, 16, 18), elements=st.floats(0, 1, width=16))


@settings(max_examples=25, deadline=None)
@given(images, images)
def test_ssim_is_symmetric_in_range_and_one_on_itself(a: np.ndarray, b: np.ndarray) -> None:
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    forth, back = float(ssim(x, y)), float(ssim(y, x))
    assert forth == pytest.approx(back, abs=1e-9)
    assert -1 - 1e-9 <= forth <= 1 + 1e-9
    assert float(ssim(x, x)) == pytest.approx(1, abs=1e-9)
