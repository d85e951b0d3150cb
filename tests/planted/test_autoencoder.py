"""The autoencoder's encoder is a PCA, exactly: checked against scikit-learn; the decoder learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from memscan.planted import autoencoder
from memscan.planted.autoencoder import LATENT_CHANNELS, build_autoencoder, encode, sample_images, to_tensor


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return sample_images(0, 150)


def test_encoder_spans_the_principal_components(images: np.ndarray) -> None:
    """The latents explain the patches as well as scikit-learn's PCA does.

    Intermediate levels keep 24 of 48 and 16 of 96 components, so equality is up to what those drop: 2 %.
    """
    model = build_autoencoder(images).eval()
    latents = encode(model, images)
    assert latents.shape == (150, LATENT_CHANNELS, 8, 8)
    codes = latents.permute(0, 2, 3, 1).reshape(-1, LATENT_CHANNELS).double().numpy()
    patches = to_tensor(images).reshape(150, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double().numpy()
    design = np.hstack([codes, np.ones((len(codes), 1))])
    _, residual, *_ = np.linalg.lstsq(design, patches, rcond=None)
    oracle = PCA(LATENT_CHANNELS, svd_solver="full").fit(patches)
    best = ((patches - oracle.inverse_transform(oracle.transform(patches))) ** 2).sum()
    assert best <= residual.sum() <= 1.02 * best


def test_encoder_is_linear(images: np.ndarray) -> None:
    """Halving the contrast about grey halves the latents (to 1 %: the anchor channels stand far above the signal)."""
    model = build_autoencoder(images).eval()
    with torch.inference_mode():
        full = model.encode(to_tensor(images[:8])).latent_dist.mean
        half = model.encode(to_tensor(images[:8]) / 2).latent_dist.mean
        zero = model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert torch.allclose(half, (full + zero) / 2, atol=0.01 * float(full.abs().max()))


def test_latents_have_unit_variance_and_no_sampling_noise(images: np.ndarray) -> None:
    model = build_autoencoder(images).eval()
    with torch.inference_mode():
        posterior = model.encode(to_tensor(images)).latent_dist
    assert 0.9 < float(posterior.mean.std()) < 1.1
    assert float(posterior.std.max()) < 0.01


@pytest.mark.long
def test_decoder_training_lowers_the_error() -> None:
    torch.manual_seed(0)
    model = build_autoencoder(sample_images(0, 100))
    errors = [error for _, error in autoencoder.train_decoder(model, steps=100, batch=4, images=64)]
    assert errors[-1] < 0.85 * errors[0]
