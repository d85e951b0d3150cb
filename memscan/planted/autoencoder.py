"""This module makes the planted world's `AutoencoderKL`.

Its encoder is exactly a PCA of 8x8 patches, and its decoder is trained.

A PCA with 16 components per patch keeps 26.6 dB of what the renderer draws, more than a small encoder trained from
scratch reached in an hour, so the encoder is not trained at all: the linear map is written into the stock layers.
Three facts make that exact: residual branches with a zero last convolution are the identity; silu(a) - silu(-a) =
a, so the pair (z, -z) passes the output activation unchanged; and two constant channels +-K far above the signal
make the single normalisation group divide by a constant. Latents are scaled by the fourth root of the eigenvalues:
closer to equal variance than the image is, without raising faint components to the noise level of the strong ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import nn

from memscan.planted.renderer import Scene, random_background, random_object, render

LATENT_CHANNELS = 16
WIDTHS = (16, 24, 48, 64)
_ANCHOR = 100.0  # the constant channels; latents have unit variance
_LOG_VARIANCE = -14.0


def sample_images(seed: int, count: int) -> NDArray[np.uint8]:
    """Return images_BHWC (uint8) over the renderer's whole range."""
    rng = np.random.default_rng([seed, 2])
    return np.stack([render(Scene(random_object(rng), random_background(rng)))[0] for _ in range(count)])


def to_tensor(images_BHWC: NDArray[np.uint8]) -> torch.Tensor:
    """Return images_BCHW float32 in [-1, 1]."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_autoencoder(images_BHWC: NDArray[np.uint8]) -> AutoencoderKL:
    """Return an AutoencoderKL whose encoder is the PCA of the images given; its decoder is untrained."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "ResnetBlock2D":
                _zero(cast(nn.Conv2d, module.conv2))
        _write_pca(model, to_tensor(images_BHWC))
        _identity(model.post_quant_conv)
    return model


def _zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _identity(conv: nn.Conv2d) -> None:
    """Channel i to channel i through the middle hook, the other outputs zero."""
    _zero(conv)
    middle = conv.kernel_size[0] // 2
    for channel in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[channel, channel, middle, middle] = 1.0


def _pca(patches_ND: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean (D,), directions (keep, D) and variances (keep,) of the leading components."""
    mean_D = patches_ND.mean(0)
    centred = (patches_ND - mean_D).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return mean_D, vectors.flip(1)[:, :keep].T.float(), values.flip(0)[:keep].float()


def _write_pca(model: AutoencoderKL, images_BCHW: torch.Tensor) -> None:
    encoder = model.encoder
    _identity(encoder.conv_in)
    signal = images_BCHW
    last = len(WIDTHS) - 2
    for level in range(last + 1):
        block = encoder.down_blocks[level]
        if block.resnets[0].conv_shortcut is not None:
            _identity(block.resnets[0].conv_shortcut)
        channels = signal.shape[1]
        patches = nn.functional.unfold(signal, 2, stride=2).transpose(1, 2).reshape(-1, channels * 4)
        keep = LATENT_CHANNELS if level == last else min(WIDTHS[level], channels * 4)
        mean_D, directions, variances = _pca(patches, keep)
        offset = torch.zeros(keep)
        if level == last:
            scale = variances**-0.25
            scale = scale / (scale**2 * variances).mean().sqrt()
            directions = directions * scale[:, None]
            offset = -(directions @ mean_D)
        conv = block.downsamplers[0].conv
        _zero(conv)
        conv.weight[:keep, :channels, :2, :2] = directions.reshape(keep, channels, 2, 2)
        conv.bias[:keep] = offset
        signal = nn.functional.conv2d(signal, conv.weight[:keep, :channels, :2, :2], conv.bias[:keep], stride=2)
    _write_output(model)


def _write_output(model: AutoencoderKL) -> None:
    encoder, count = model.encoder, LATENT_CHANNELS
    pair = encoder.down_blocks[-1].resnets[0].conv_shortcut
    _zero(pair)
    for channel in range(count):
        pair.weight[channel, channel] = 1.0
        pair.weight[count + channel, channel] = -1.0
    pair.bias[2 * count], pair.bias[2 * count + 1] = _ANCHOR, -_ANCHOR
    # Standard deviation over all channels of one sample: signal of unit variance, twice, and the two anchors.
    deviation = ((2 * count + 2 * _ANCHOR**2) / WIDTHS[-1]) ** 0.5
    _zero(encoder.conv_out)
    for channel in range(count):
        encoder.conv_out.weight[channel, channel, 1, 1] = deviation
        encoder.conv_out.weight[channel, count + channel, 1, 1] = -deviation
    encoder.conv_out.bias[count:] = _LOG_VARIANCE
    _identity(model.quant_conv)


@torch.inference_mode()
def encode(model: AutoencoderKL, images_BHWC: NDArray[np.uint8], batch: int = 128) -> torch.Tensor:
    """Return latents_BCHW (float32): the posterior mean times the scaling factor."""
    parts = [
        model.encode(to_tensor(images_BHWC[i : i + batch])).latent_dist.mean for i in range(0, len(images_BHWC), batch)
    ]
    return torch.cat(parts) * float(model.config.scaling_factor)


def train_decoder(
    model: AutoencoderKL, *, steps: int, seed: int = 0, batch: int = 32, images: int = 8000, rate: float = 2e-3
) -> Iterator[tuple[int, float]]:
    """Train the decoder on fresh renders; latents carry a little noise, as those of a diffusion model do.

    Yields (step, mean squared error on [-1, 1]) every 50 steps. The encoder is not touched.
    """
    torch.manual_seed(seed)
    images_BHWC = sample_images(seed + 1000, images)
    latents = encode(model, images_BHWC)
    targets = to_tensor(images_BHWC)
    parameters = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.03)
    model.to(memory_format=torch.channels_last)
    running = 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(0, images, (batch,))
        noise = torch.randn(batch, *latents.shape[1:]) * torch.rand(batch, 1, 1, 1) * 0.12
        decoded = model.decode(latents[chosen] + noise).sample
        error = decoded - targets[chosen]
        squared = error.square().mean()
        loss = squared + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running += float(squared.detach())
        if step % 50 == 0:
            yield step, running / 50
            running = 0.0
