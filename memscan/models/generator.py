"""The model under census: captions and seeds in, images and signals out.

Any Stable Diffusion 1.x or 2.x checkpoint in diffusers' format, under any of its schedulers. The images equal the stock
pipeline's on the same latents; an image depends on its caption and seed, not on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from memscan.config import GeneratorConfig
from memscan.errors import ModelError
from memscan.models.checkpoint import Checkpoint, load_checkpoint
from memscan.models.devices import require_device
from memscan.models.sampling import Condition, initial_latents, sample
from memscan.models.schedulers import check_steps, make_scheduler
from memscan.models.specification import ModelSpec
from memscan.models.taps import NoiseNormTap, Signals, Tap

# Image pixels that the VAE decodes at once: its activations are the peak of the whole run at 512 pixels and more.
DECODE_PIXELS = 2**22
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Generations:
    """What one call generated.

    Args:
        images_BHWC: RGB, uint8.
        signals: by name, each float32 (B,).
        finite_B: whether the decoder's output was finite, bool; where it is not, the image has no meaning.
    """

    images_BHWC: npt.NDArray[np.uint8]
    signals: Signals
    finite_B: npt.NDArray[np.bool_]


class Generator:
    """A loaded checkpoint with its sampling rule. Not for use by several threads at once: schedulers keep state.

    Args:
        checkpoint: the loaded components.
        config: sampling rule; `path` and `dtype` are taken from the checkpoint.
        taps: collectors of signals; noise norms when not given.

    Raises:
        ModelError: the scheduler is unknown or cannot take the steps, or the image size does not fit the VAE.
    """

    def __init__(self, checkpoint: Checkpoint, config: GeneratorConfig, taps: Sequence[Tap] | None = None) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.taps: tuple[Tap, ...] = (NoiseNormTap(),) if taps is None else tuple(taps)
        self.scheduler = make_scheduler(config.scheduler, checkpoint.scheduler_config, where=checkpoint.where)
        check_steps(self.scheduler, config.steps, where=checkpoint.where)
        self.height, self.width = _image_size(checkpoint, config)
        self._empty_1TD: torch.Tensor | None = None

    @classmethod
    def load(cls, config: GeneratorConfig, device: str = "cpu", taps: Sequence[Tap] | None = None) -> Generator:
        """Load the configured checkpoint onto a device.

        Raises:
            ModelError: the checkpoint is incomplete, broken or of another kind, or the device is not there.
        """
        checkpoint = load_checkpoint(config.path, config.revision, require_device(device), _DTYPES[config.dtype])
        return cls(checkpoint, config, taps)

    @property
    def spec(self) -> ModelSpec:
        """Checkpoint and sampling rule."""
        rule = self.config
        preprocessing = (
            f"{rule.scheduler}-{rule.steps}-cfg{rule.guidance:g}-{self.height}x{self.width}"
            f"-{self.checkpoint.max_tokens}tokens-{rule.dtype}"
        )
        return ModelSpec("generator", self.checkpoint.name, self.checkpoint.sha256, preprocessing)

    def generate(self, captions: Sequence[str], seeds: Sequence[int], first: torch.Tensor | None = None) -> Generations:
        """One image a (caption, seed) pair, in order.

        Captions longer than the model's token limit are truncated, as the stock pipeline does.

        Args:
            captions: any text, repeats welcome: each distinct caption is encoded once.
            seeds: in [0, 2**63), as many as captions.
            first: the denoiser's outputs at the first step for these captions and seeds where a screen has them:
                (2, N, C, h, w) without and with the caption, or (1, N, C, h, w) without guidance; that step is then
                not computed again.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions but {len(seeds)} seeds")
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        text_NTD = self.encode(list(rows))
        chosen = [rows[caption] for caption in captions]
        batches = []
        for start in range(0, len(seeds), self.config.batch_size):
            span = slice(start, start + self.config.batch_size)
            known = None if first is None else first[:, span].flatten(0, 1)
            batches.append(self._generate_batch(text_NTD[chosen[span]], seeds[span], known))
        return _concatenate(batches, self.height, self.width)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Text embeddings (N, T, D) on the device: the text encoder's last hidden states."""
        encoder = self.checkpoint.text_encoder
        size = self.config.batch_size
        parts = [self._encode_batch(list(captions[start : start + size])) for start in range(0, len(captions), size)]
        empty = torch.empty(
            (0, self.checkpoint.max_tokens, encoder.config.hidden_size), dtype=encoder.dtype, device=encoder.device
        )
        return torch.cat(parts) if parts else empty

    def _encode_batch(self, captions: list[str]) -> torch.Tensor:
        encoder = self.checkpoint.text_encoder
        tokens = self.checkpoint.tokenizer(
            captions,
            padding="max_length",
            max_length=self.checkpoint.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        hidden: torch.Tensor = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        return hidden

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latent."""
        scale = self.checkpoint.vae_scale
        return int(self.checkpoint.unet.config.in_channels), self.height // scale, self.width // scale

    @torch.inference_mode()
    def _generate_batch(self, text_BTD: torch.Tensor, seeds: Sequence[int], first: torch.Tensor | None) -> Generations:
        noise, generators = initial_latents(seeds, self.latent_shape)
        condition = Condition(text_BTD, self.empty_text(), self.config.guidance)
        rule = self.config
        latents = sample(
            self.checkpoint.unet, self.scheduler, condition, noise, generators, rule.steps, self.taps, first
        )
        images, finite = self.decode(latents)
        signals: Signals = {}
        for tap in self.taps:
            signals.update(tap.result())
        return Generations(images, signals, finite)

    def empty_text(self) -> torch.Tensor | None:
        """Embedding (1, T, D) of the empty caption; None where guidance is off."""
        if self.config.guidance <= 1:
            return None
        if self._empty_1TD is None:
            self._empty_1TD = self.encode([""])
        return self._empty_1TD

    @torch.inference_mode()
    def decode(self, latents_BCHW: torch.Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Images (B, H, W, 3) uint8 of latents, rounded as the stock pipeline does, and whether each was finite."""
        vae = self.checkpoint.vae
        latents = latents_BCHW / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        images, finite = [], []
        for part in latents.to(vae.dtype).split(max(1, DECODE_PIXELS // (self.height * self.width))):
            pixels = vae.decode(part, return_dict=False)[0]
            finite.append(torch.isfinite(pixels).flatten(1).all(dim=1))
            unit = (pixels * 0.5 + 0.5).clamp(0, 1).float().nan_to_num()
            images.append((unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
        return torch.cat(images).cpu().numpy(), torch.cat(finite).cpu().numpy()


def _image_size(checkpoint: Checkpoint, config: GeneratorConfig) -> tuple[int, int]:
    native = checkpoint.unet.config.sample_size
    rows, columns = (native, native) if isinstance(native, int) else native
    height = config.height or rows * checkpoint.vae_scale
    width = config.width or columns * checkpoint.vae_scale
    if height % checkpoint.vae_scale or width % checkpoint.vae_scale:
        raise ModelError(
            f"image size {height}x{width} is not a multiple of the VAE's {checkpoint.vae_scale}",
            where=checkpoint.where,
            hint="change generator.height and generator.width",
        )
    return height, width


def _concatenate(batches: Sequence[Generations], height: int, width: int) -> Generations:
    if not batches:
        return Generations(np.zeros((0, height, width, 3), np.uint8), {}, np.zeros(0, np.bool_))
    return Generations(
        np.concatenate([batch.images_BHWC for batch in batches]),
        {name: np.concatenate([batch.signals[name] for batch in batches]) for name in batches[0].signals},
        np.concatenate([batch.finite_B for batch in batches]),
    )
