"""How alike the first steps of one prompt's seeds are: MS-SSIM of what the model wants to change (NeMo's delta)."""

from __future__ import annotations

import torch
from torch.nn import functional

WINDOW, SCALES = 11, 3
_C1, _C2 = 0.01**2, 0.03**2
_SIGMA = 1.5


def seed_similarity(delta_PSCHW: torch.Tensor) -> torch.Tensor:
    """Mean MS-SSIM over all pairs of seeds, (P,) float32.

    Each channel is min-max normalised by itself; three scales of equal weight with an 11 x 11 Gaussian, as Hintersdorf
    et al. 2024 (NeMo, appendix C) have it. Latents too small for that get fewer scales and a smaller window: an odd one
    of at most half the side, at least 3 (8 x 8: 3 x 3, two scales). Scores of different sizes are not comparable.

    Raises:
        ValueError: fewer than two seeds.
    """
    prompts, seeds = delta_PSCHW.shape[:2]
    if seeds < 2:
        raise ValueError("the similarity of seeds needs two of them")
    flat = delta_PSCHW.flatten(3)
    low, high = flat.amin(dim=3), flat.amax(dim=3)
    unit = (delta_PSCHW - low[..., None, None]) / (high - low).clamp_min(1e-12)[..., None, None]
    total = torch.zeros(prompts, device=unit.device)
    pairs = [(one, other) for one in range(seeds) for other in range(one + 1, seeds)]
    for one, other in pairs:
        total += ms_ssim(unit[:, one], unit[:, other])
    return total / len(pairs)


def ms_ssim(one_BCHW: torch.Tensor, other_BCHW: torch.Tensor) -> torch.Tensor:
    """MS-SSIM (Wang et al. 2003) of images in [0, 1] with equal weights, windows fitted to the size; (B,)."""
    side = min(one_BCHW.shape[-2:])
    window = min(WINDOW, max(3, side // 2 - 1 + (side // 2) % 2))
    scales = [number for number in range(SCALES) if side >> number >= window]
    product = torch.ones(len(one_BCHW), device=one_BCHW.device)
    for number in scales:
        if number:
            one_BCHW, other_BCHW = (functional.avg_pool2d(image, 2) for image in (one_BCHW, other_BCHW))
        full, contrast = _ssim(one_BCHW, other_BCHW, window)
        part = full if number == scales[-1] else contrast
        product = product * part.clamp_min(0) ** (1 / len(scales))
    return product


def _ssim(one: torch.Tensor, other: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean SSIM and mean contrast-structure over the valid part, each (B,)."""
    channels = one.shape[1]
    at = torch.arange(window, device=one.device, dtype=one.dtype) - window // 2
    line = torch.softmax(-(at**2) / (2 * _SIGMA**2), dim=0)
    kernel = torch.outer(line, line).expand(channels, 1, window, window)

    def blurred(image: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(image, kernel, groups=channels)

    mean_one, mean_other = blurred(one), blurred(other)
    var_one, var_other = blurred(one * one) - mean_one**2, blurred(other * other) - mean_other**2
    covariance = blurred(one * other) - mean_one * mean_other
    contrast = (2 * covariance + _C2) / (var_one + var_other + _C2)
    luminance = (2 * mean_one * mean_other + _C1) / (mean_one**2 + mean_other**2 + _C1)
    return (contrast * luminance).flatten(1).mean(dim=1), contrast.flatten(1).mean(dim=1)
