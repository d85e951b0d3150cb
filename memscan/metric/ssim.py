"""This module computes SSIM and MS-SSIM.

What belongs to one image is computed once, and only the cross term is computed per pair.

For images x, y and the Gaussian filter G (11x11, sigma 1.5) the maps of Wang et al. (2004) are

    cov = G[xy] - G[x]G[y]        contrast-structure = (2 cov + c2) / (var_x + var_y + c2)
                                  luminance          = (2 G[x]G[y] + c1) / (G[x]^2 + G[y]^2 + c1)

G[x] and var_x are computed in `prepare_stack` for every scale; a pair costs one separable filter of x*y and five
elementwise passes. MS-SSIM (Wang et al. 2003) takes the mean contrast-structure of scales 1-4 and the mean SSIM of
scale 5, clips each at 0 and multiplies them with the published exponents. Borders are treated as in torchmetrics, which
the published FB-Mem code calls: contrast-structure on the valid part, SSIM on the whole image padded by reflection.

Variance and covariance do not change when a constant is subtracted from an image. Subtracting the value of a filled
area makes the fill exactly zero, which keeps single precision exact there (`offset_C`).

Shapes: B batch, C channels, H W height and width, S scales, N candidates. Values are in [0, 1] (data range 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 11
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SCALES = len(WEIGHTS)

_PAD = WINDOW // 2
# Candidates are concatenated while a batch stays below so many elements. A convolution has a fixed cost (0.1 ms on a
# CPU), so small scales gain eightfold from batches; large ones lose twofold where a batch leaves the cache.
_BATCH_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 26}


@dataclass(frozen=True)
class Level:
    """This is one scale of a stack of images.

    Attributes:
        values_BCHW: the images less their offset; padded by reflection at the last scale.
        mean_BCHW: G[values], smaller than `values_BCHW` by the window less one.
        spread_BCHW: (variance + c2 / 2) / 2, so that two spreads add up to the denominator of the contrast-structure.
    """

    values_BCHW: Tensor
    mean_BCHW: Tensor
    spread_BCHW: Tensor


@dataclass(frozen=True)
class PreparedStack:
    """These are the moments of one stack of images (B = 1, any number of channels) at every scale."""

    levels: tuple[Level, ...]
    offset_C: Tensor

    @property
    def nbytes(self) -> int:
        """This is the memory that is held, in bytes: about 16 C H W in single precision."""
        tensors = [t for level in self.levels for t in (level.values_BCHW, level.mean_BCHW, level.spread_BCHW)]
        return sum(t.element_size() * t.nelement() for t in tensors)


def minimum_side(scales: int = len(WEIGHTS)) -> int:
    """Return the smallest image side for `scales` scales; the window must fit into the last one (176 for five)."""
    return int(WINDOW * 2 ** (scales - 1))


def prepare_stack(images_BCHW: Tensor, *, scales: int = len(WEIGHTS), offset_C: Tensor | None = None) -> PreparedStack:
    """Compute the pyramid and its moments.

    Args:
        images_BCHW: floating point, in [0, 1].
        scales: number of scales; 1 is plain SSIM.
        offset_C: constant subtracted from each channel (default 0); changes rounding only, not the result.

    Raises:
        ValueError: not four dimensions, not floating point, or too small for the scales.
    """
    _check(images_BCHW, scales)
    channels = images_BCHW.shape[1]
    offset = images_BCHW.new_zeros(channels) if offset_C is None else offset_C.to(images_BCHW)
    # Depthwise filters are sixfold faster in channels-last. `contiguous` would keep the strides of a permuted batch of
    # one, which later operations do not recognise as channels-last.
    x = torch.empty_like(images_BCHW, memory_format=torch.channels_last)
    torch.sub(images_BCHW, offset.view(1, channels, 1, 1), out=x)
    levels = []
    for scale in range(scales):
        last = scale == scales - 1
        levels.append(level_of(x, padded=last))
        if not last:
            x = F.avg_pool2d(x, 2)
    return PreparedStack(tuple(levels), offset)


def _check(images_BCHW: Tensor, scales: int) -> None:
    if images_BCHW.ndim != 4 or not images_BCHW.is_floating_point():
        raise ValueError(f"expected floating point BCHW, got {images_BCHW.dtype} of shape {tuple(images_BCHW.shape)}")
    size = tuple(images_BCHW.shape[2:])
    if min(size) < minimum_side(scales):
        raise ValueError(f"{scales} scales need images of at least {minimum_side(scales)} px, got {size}")


def level_of(values_BCHW: Tensor, *, padded: bool = False) -> Level:
    """Return the moments of images at one scale, (B, C, H, W).

    With `padded` they are padded by reflection, so that maps are as large as the images.
    """
    if padded:
        values_BCHW = F.pad(values_BCHW, (_PAD,) * 4, mode="reflect")
    mean, square = gaussian_filter(torch.cat([values_BCHW, values_BCHW * values_BCHW])).chunk(2)
    variance = square.addcmul_(mean, mean, value=-1).clamp_(min=0)
    return Level(values_BCHW, mean, variance.add_(C2 / 2).div_(2))


def gaussian_filter(images_BCHW: Tensor, bias: float = 0.0) -> Tensor:
    """Return the separable Gaussian filter, valid part only (H and W shrink by 10), plus a constant."""
    rows, columns, constant = _windows(images_BCHW.shape[1], bias, images_BCHW.dtype, images_BCHW.device)
    groups = images_BCHW.shape[1]
    return F.conv2d(F.conv2d(images_BCHW, rows, groups=groups), columns, constant, groups=groups)


@lru_cache(maxsize=64)
def _windows(channels: int, bias: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    distance = torch.arange(WINDOW, dtype=torch.float64) - _PAD
    window = torch.exp(-((distance / SIGMA) ** 2) / 2)
    window = (window / window.sum()).to(device, dtype)
    rows = window.view(1, 1, 1, WINDOW).repeat(channels, 1, 1, 1)
    columns = window.view(1, 1, WINDOW, 1).repeat(channels, 1, 1, 1)
    return rows, columns, torch.full((channels,), bias, dtype=dtype, device=device)


def contrast_map(a: Level, b: Level) -> Tensor:
    """Return the contrast-structure map (2 cov + c2) / (var_a + var_b + c2), BCHW; batches broadcast."""
    covariance = gaussian_filter(a.values_BCHW * b.values_BCHW, bias=C2 / 2)
    covariance.addcmul_(a.mean_BCHW, b.mean_BCHW, value=-1)
    return covariance.div_(a.spread_BCHW + b.spread_BCHW)


def luminance_map(a: Level, b: Level, offset_C: Tensor) -> Tensor:
    """Return the luminance map (2 m_a m_b + c1) / (m_a^2 + m_b^2 + c1) of the true means, BCHW."""
    offset = offset_C.view(1, -1, 1, 1)
    mean_a, mean_b = a.mean_BCHW + offset, b.mean_BCHW + offset
    return (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)


def scale_terms(a: PreparedStack, others: Sequence[PreparedStack]) -> Tensor:
    """Return the mean contrast-structure (last scale: mean SSIM) per candidate, scale and channel.

    Args:
        a: one stack (B = 1).
        others: stacks (B = 1) of the same size, channels and offsets.

    Returns:
        Tensor of shape (N, S, C), N = len(others); not clipped.

    Raises:
        ValueError: the stacks do not fit together.
    """
    for other in others:
        if len(other.levels) != len(a.levels) or other.levels[0].values_BCHW.shape != a.levels[0].values_BCHW.shape:
            raise ValueError("stacks of different size, channels or number of scales cannot be compared")
    scales = []
    for scale, level in enumerate(a.levels):
        offset = a.offset_C if scale == len(a.levels) - 1 else None
        batches = batched([other.levels[scale] for other in others], level.values_BCHW)
        scales.append(torch.cat([_mean_terms(level, concatenate(batch), offset) for batch in batches]))
    return torch.stack(scales, dim=1)


def _mean_terms(a: Level, b: Level, offset_C: Tensor | None) -> Tensor:
    terms = contrast_map(a, b)
    if offset_C is not None:
        terms = terms.mul_(luminance_map(a, b, offset_C))
    return terms.mean(dim=(2, 3))


T = TypeVar("T")


def batched(items: Sequence[T], like: Tensor) -> list[Sequence[T]]:
    """Return the items in batches of the size that is fastest for maps as large as `like` (B = 1)."""
    budget = _BATCH_ELEMENTS["cpu" if like.device.type == "cpu" else "other"]
    size = max(1, budget // like.nelement())
    return [items[start : start + size] for start in range(0, len(items), size)]


def concatenate(levels: Sequence[Level]) -> Level:
    """Return the levels of several stacks as one batch."""
    if len(levels) == 1:
        return levels[0]
    return Level(
        torch.cat([level.values_BCHW for level in levels]),
        torch.cat([level.mean_BCHW for level in levels]),
        torch.cat([level.spread_BCHW for level in levels]),
    )


def combine_scales(terms_BS: Tensor, weights: Sequence[float] = WEIGHTS) -> Tensor:
    """Return MS-SSIM from the mean term of each scale.

    It is the product over scales of max(term, 0) ** weight, shape (B,).
    """
    exponents = torch.tensor(weights, dtype=terms_BS.dtype, device=terms_BS.device)
    return torch.prod(torch.relu(terms_BS) ** exponents, dim=1)


def ms_ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Return MS-SSIM of image pairs, shape (B,), in [0, 1]; the mean over channels is taken per scale.

    Args:
        a_BCHW, b_BCHW: floating point, in [0, 1], at least 176 px a side.

    Raises:
        ValueError: shapes differ, or images are too small.
    """
    return combine_scales(_pair_terms(a_BCHW, b_BCHW, len(WEIGHTS)))


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Return SSIM of image pairs, shape (B,), in [-1, 1].

    The arguments are those of `ms_ssim`; images need at least 11 px per side.
    """
    return _pair_terms(a_BCHW, b_BCHW, 1)[:, 0]


def _pair_terms(a_BCHW: Tensor, b_BCHW: Tensor, scales: int) -> Tensor:
    if a_BCHW.shape != b_BCHW.shape:
        raise ValueError(f"images differ in shape: {tuple(a_BCHW.shape)} and {tuple(b_BCHW.shape)}")
    a, b = prepare_stack(a_BCHW, scales=scales), prepare_stack(b_BCHW, scales=scales)
    return scale_terms(a, [b]).mean(dim=2)
