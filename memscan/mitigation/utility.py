"""This module measures what a repair cost on ordinary prompts.

* `frechet_distance` between two sets of image features (Heusel et al. 2017, equation 6), under an encoder that the
  caller names: with a copy-detection embedder it is not FID, and is not comparable with one.
* `diversity` over the seeds of a prompt: mean pairwise cosine distance of features.
* `alignment` of image and caption under a denoiser: how much better it predicts the noise on the image with the
  caption than without, mean over strata of the schedule. Up to weights this is the pointwise mutual information of
  image and caption (Kong et al. 2023, "Interpretable diffusion via information decomposition"; the score of a
  diffusion classifier, Li et al. 2023). It needs no second encoder, which a model of its own world has not; for
  Stable Diffusion a CLIP score can be added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memscan.models.denoiser import Denoiser, spread_timesteps

Float = npt.NDArray[np.floating[Any]]


def frechet_distance(a_ND: Float, b_ND: Float) -> float:
    """Return the squared Fréchet distance of the Gaussians with the sets' means and covariances:
    |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½).

    The trace of the root is the sum of the singular values of C_a^½ C_b^½, which needs no root of a product that
    rounding has made asymmetric.

    Raises:
        ValueError: fewer than two rows, different widths, or values that are not finite.
    """
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_ND, np.float64)
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"cannot compare features of shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features are not finite")
    root_a, root_b = _root(np.cov(a, rowvar=False)), _root(np.cov(b, rowvar=False))
    cross = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    shift = float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum())
    return max(0.0, shift + float((root_a**2).sum() + (root_b**2).sum()) - 2 * float(cross))


def _root(covariance_DD: Float) -> Float:
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_DD))
    root: Float = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def diversity(features_PSD: Float) -> float:
    """Return the mean over prompts of the mean cosine distance between the seeds of a prompt, in [0, 2].

    Args:
        features_PSD: unit vectors of S >= 2 generations for each of P prompts.
    """
    prompts, seeds, _ = features_PSD.shape
    if prompts == 0 or seeds < 2:
        raise ValueError(f"diversity needs prompts with two seeds each, not {features_PSD.shape}")
    cosines = np.einsum("psd,ptd->pst", features_PSD, features_PSD, dtype=np.float64)
    off = cosines.sum(axis=(1, 2)) - np.trace(cosines, axis1=1, axis2=2)
    return float(1 - (off / (seeds * (seeds - 1))).mean())


@torch.no_grad()
def alignment(
    denoiser: Denoiser,
    latents_NCHW: Tensor,
    text_NTD: Tensor,
    empty_TD: Tensor,
    *,
    strata: int = 8,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Return how much the caption helps to predict the noise on each image, (N,); it is 0 if the caption does not help.

    Args:
        denoiser: the model before any repair, the same for all that are compared.
        latents_NCHW: of the images.
        strata: timesteps, spread over the schedule; noise and timesteps are the same for every image.
        seed: of the noise.
    """
    device = denoiser.device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((strata, *latents_NCHW.shape[1:]), generator=generator).to(device)
    times = spread_timesteps(strata, denoiser.timesteps, 0.5, device)
    found = []
    for start in range(0, len(latents_NCHW), max(1, batch // strata)):
        clean = latents_NCHW[start : start + max(1, batch // strata)].to(device)
        text = text_NTD[start : start + len(clean)].to(device)
        rows = clean.repeat_interleave(strata, dim=0)
        arguments = rows, noise.repeat(len(clean), 1, 1, 1), times.repeat(len(clean))
        with_text = denoiser.losses(*arguments, text.repeat_interleave(strata, dim=0))
        without = denoiser.losses(*arguments, empty_TD.to(device).expand(len(rows), -1, -1))
        found.append((without - with_text).view(len(clean), strata).mean(dim=1))
    return torch.cat(found).cpu() if found else torch.zeros(0)


def cost(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an ordinary panel lost, from two models' examinations.

    Args:
        before, after: "panel_PSD" features (prompts, seeds, width), "alignment_PS", and "training_ND" features.

    Returns:
        "frechet": panel before and after against the training images, their "ratio", and after against before;
        "diversity" and "alignment" before and after; diversity is None for one seed per prompt.
    """
    panels = {when: one["panel_PSD"].reshape(-1, one["panel_PSD"].shape[-1]) for when, one in _both(before, after)}
    training = before["training_ND"]
    first, second = (frechet_distance(panels[when], training) for when in ("before", "after"))
    seeds = before["panel_PSD"].shape[1]
    return {
        "images": len(panels["after"]),
        "training_images": len(training),
        "frechet": {
            "before": first,
            "after": second,
            "ratio": second / first if first > 0 else None,
            "between": frechet_distance(panels["before"], panels["after"]),
        },
        "diversity": {when: diversity(one["panel_PSD"]) if seeds > 1 else None for when, one in _both(before, after)},
        "alignment": {when: float(np.mean(one["alignment_PS"])) for when, one in _both(before, after)},
    }


def _both(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("before", before), ("after", after)


def encode_images(vae: Any, images_BHWC: Sequence[npt.NDArray[np.uint8]], batch: int = 16) -> Tensor:
    """Return latents (N, C, h, w) of RGB images: the mean of the VAE's posterior, scaled as for the UNet's training."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(images_BHWC), batch):
            pixels = torch.from_numpy(np.stack(images_BHWC[start : start + batch])).permute(0, 3, 1, 2)
            unit = pixels.to(vae.device, vae.dtype) / 127.5 - 1
            mean = vae.encode(unit).latent_dist.mean - (vae.config.get("shift_factor") or 0.0)
            parts.append((mean * vae.config.scaling_factor).float().cpu())
    return torch.cat(parts)
