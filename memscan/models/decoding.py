"""This module decodes latents to images, by the VAE's decoder in the batch size that is fastest.

At 512 pixels and more, a decoder's activations need the most memory of a whole run. Its time per image has a minimum at
a small batch: if its layers no longer fit the caches, one batch of 16 images at 512 pixels is slower than 16 batches of
one. On a GPU the size is found once by trying. On a CPU a batch holds 4 megapixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memscan.models.batch_size import fastest_size

# Image pixels that the VAE decodes at once where nothing was tried.
DECODE_PIXELS = 2**22
_SIZES = (1, 2, 4, 8, 16)


class Decoder:
    """This is the decoder of a checkpoint's VAE.

    Args:
        vae: an `AutoencoderKL`.
        pixels: of one image; only for the size of a batch.
        most: images in a batch of the sampling, and so at once here.
    """

    def __init__(self, vae: Any, pixels: int, most: int) -> None:
        self._vae, self._pixels, self.most = vae, pixels, most
        self._size: int | None = None
        self._compiled: Any = None

    def compile(self, compiler: Callable[[Any], Any]) -> None:
        """Run `compiler`'s form from now on, in batches of one size: every other one would be compiled again."""
        self._compiled = compiler(self.run)

    def run(self, latents_BCHW: Tensor) -> Tensor:
        """Run the network itself: scaled latents in its precision become pixels in about [-1, 1]."""
        pixels: Tensor = self._vae.decode(latents_BCHW, return_dict=False)[0]
        return pixels

    @torch.inference_mode()
    def __call__(self, latents_BCHW: Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return images (B, H, W, 3) uint8, rounded as the stock pipeline does, and whether each was finite."""
        config = self._vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (latents_BCHW.new_tensor(config[key]).view(1, -1, 1, 1) for key in _MOMENTS)
            latents = latents_BCHW * std / config.scaling_factor + mean
        else:
            latents = latents_BCHW / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images, finite = [], []
        size = self._batch(latents)
        for part in latents.to(self._vae.dtype).split(size):
            pixels = self._decoded(part, size)
            finite.append(torch.isfinite(pixels).flatten(1).all(dim=1))
            unit = (pixels * 0.5 + 0.5).clamp(0, 1).float().nan_to_num()
            images.append((unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
        return torch.cat(images).cpu().numpy(), torch.cat(finite).cpu().numpy()

    def _decoded(self, part: Tensor, size: int) -> Tensor:
        if self._compiled is None:
            return self.run(part)
        padded = torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)])
        pixels: Tensor = self._compiled(padded)[: len(part)]
        return pixels

    def _batch(self, latents: Tensor) -> int:
        if latents.device.type != "cuda":
            return max(1, min(DECODE_PIXELS // self._pixels, self.most))
        if self._size is None:
            one = latents[:1].to(self._vae.dtype)
            sizes = [size for size in _SIZES if size <= max(1, self.most)]
            self._size = fastest_size(lambda size: self.run(one.expand(size, -1, -1, -1)), sizes, device=one.device)
        return self._size


_MOMENTS = ("latents_mean", "latents_std")
