"""This module is the model under census: captions and seeds go in, images and signals come out.

It runs any Stable Diffusion 1.x, 2.x or XL checkpoint in diffusers' format, under any of its schedulers. The images
equal those of the stock pipeline on the same latents. An image depends on its caption and seed, and not on its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memscan.config import GeneratorConfig, ResourcesConfig
from memscan.errors import ModelError
from memscan.models.acceleration import Acceleration, accelerate, compile_function
from memscan.models.batch_size import largest_batch
from memscan.models.checkpoint import HUB_FILES, Checkpoint, load_checkpoint
from memscan.models.composition import resolve_checkpoint
from memscan.models.decoding import Decoder
from memscan.models.devices import require_device
from memscan.models.hooks import DifferenceMapHook, Maps, NoiseNormHook, PredictionHook, Signals, collect
from memscan.models.noise_schedules import chosen
from memscan.models.sampling import Condition, initial_latents, sample
from memscan.models.schedulers import check_steps, make_scheduler
from memscan.models.specification import ModelSpec
from memscan.models.text import Text, TextEncoder, size_ids

# Captions that a GPU encodes at once: in batches of 8 the start of each kernel costs more than its work.
TEXT_BATCH = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Generations:
    """This is what one call generated.

    Args:
        images_BHWC: RGB, uint8.
        signals: by name, each float32 (B,).
        finite_B: whether the decoder's output was finite, bool; where it is not, the image has no meaning.
        maps_Bhw: localisation maps in [0, 1], float32, rows of NaN if an image has none; None without any.
    """

    images_BHWC: npt.NDArray[np.uint8]
    signals: Signals
    finite_B: npt.NDArray[np.bool_]
    maps_Bhw: Maps | None = None

    def take(self, rows: npt.NDArray[np.intp]) -> Generations:
        """Return some of the generations, in another order."""
        return Generations(
            self.images_BHWC[rows],
            {name: values[rows] for name, values in self.signals.items()},
            self.finite_B[rows],
            None if self.maps_Bhw is None else self.maps_Bhw[rows],
        )


class Generator:
    """This is a loaded checkpoint with its sampling rule.

    Do not use it in several threads at once, because schedulers keep state.

    Args:
        checkpoint: the loaded components.
        config: sampling rule; `path` and `dtype` are taken from the checkpoint.
        hooks: collectors of signals; by default noise norms and the map of the first step.
        acceleration: what is done for speed; by default nothing.

    Raises:
        ModelError: the scheduler is unknown or cannot take the steps, the image size does not fit the VAE, or feature
            caching does not work on the denoiser.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: GeneratorConfig,
        hooks: Sequence[PredictionHook] | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.hooks: tuple[PredictionHook, ...] = (
            (NoiseNormHook(), DifferenceMapHook()) if hooks is None else tuple(hooks)
        )
        name = chosen(config.scheduler, checkpoint.scheduler_config)
        self.scheduler = make_scheduler(name, checkpoint.scheduler_config, where=checkpoint.where)
        check_steps(self.scheduler, config.steps, where=checkpoint.where)
        self.height, self.width = _image_size(checkpoint, config)
        on_gpu = checkpoint.unet.device.type == "cuda"
        self.text_encoder = TextEncoder(
            checkpoint, max(config.batch_size, TEXT_BATCH if on_gpu else 1), config.clip_skip
        )
        self._empty_text: Text | None = None
        self.decode = Decoder(checkpoint.vae, self.height * self.width, config.batch_size)
        self.batch_size = config.batch_size
        self.calls = 0  # rows that went through the denoiser, as in `calls.py`
        self.acceleration = acceleration or Acceleration()
        self._accelerate()

    def _accelerate(self) -> None:
        parts, acceleration = self.checkpoint, self.acceleration
        if acceleration.channels_last:
            parts.unet.to(memory_format=torch.channels_last)
            parts.vae.to(memory_format=torch.channels_last)
        self.denoiser = parts.unet
        if acceleration.probe:
            self.decode.most = self.batch_size = largest_batch(self._trial)
        interval = self.config.cache_interval
        try:
            self.denoiser = accelerate(parts.unet, acceleration, rows=self.batch_size, interval=interval)
        except ValueError as error:
            raise ModelError(str(error), where=parts.where, hint="set generator.cache_interval to 1") from error
        if acceleration.compile == "inductor":
            self.decode.compile(compile_function)

    def one_step_denoiser(self, rows: int) -> Any:
        """Return the denoiser for calls of at most this number of rows that share nothing.

        It is compiled if that of the sampling is.

        If it is compiled, it is not differentiable, and it runs without the hooks and processors that others put on the
        network.
        """
        if self.acceleration.compile == "off":
            return self.checkpoint.unet
        return accelerate(self.checkpoint.unet, self.acceleration, rows=rows)

    @classmethod
    def load(
        cls,
        config: GeneratorConfig,
        device: str = "cpu",
        hooks: Sequence[PredictionHook] | None = None,
        resources: ResourcesConfig | None = None,
    ) -> Generator:
        """Load the configured checkpoint onto a device.

        Args:
            resources: what may be done for speed there; its defaults when not given.

        Raises:
            ModelError: the checkpoint is incomplete, damaged or of another kind, or the device does not exist.
        """
        place = require_device(device)
        folder = config.path if config.base is None else str(resolve_checkpoint(config, HUB_FILES))
        checkpoint = load_checkpoint(
            folder, config.revision, place, DTYPES[config.dtype], config.loras, config.textual_inversions
        )
        return cls(checkpoint, config, hooks, Acceleration.of(resources or ResourcesConfig(), place))

    @property
    def spec(self) -> ModelSpec:
        """This specifies checkpoint and sampling rule."""
        rule = self.config
        preprocessing = (
            f"{type(self.scheduler).__name__}-{rule.steps}-cfg{rule.guidance:g}-{self.height}x{self.width}"
            f"-{self.checkpoint.max_tokens}tokens-{rule.dtype}"
            + (f"-guided{rule.guided_share:g}" if rule.guided_share < 1 else "")
            + (f"-cached{rule.cache_interval}" if rule.cache_interval > 1 else "")
            + (f"-clipskip{rule.clip_skip}" if rule.clip_skip else "")
            + negative_name(rule.negative_prompt)
        )
        return ModelSpec("generator", self.checkpoint.name, self.checkpoint.sha256, preprocessing)

    def generate(self, captions: Sequence[str], seeds: Sequence[int], first: torch.Tensor | None = None) -> Generations:
        """Generate one image per (caption, seed) pair, in order.

        Captions longer than the model's token limit are truncated, as the stock pipeline does.

        Args:
            captions: any text; repeats are allowed, and each distinct caption is encoded once.
            seeds: in [0, 2**63), as many as captions.
            first: the denoiser's outputs at the first step for these captions and seeds, if a screen has them:
                (2, N, C, h, w) without and with the caption, or (1, N, C, h, w) without guidance; that step is then
                not computed again.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions but {len(seeds)} seeds")
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        text = self.text_encoder(list(rows))
        return self.generate_from(text[[rows[caption] for caption in captions]], seeds, first)

    def generate_from(self, text: Text, seeds: Sequence[int], first: torch.Tensor | None = None) -> Generations:
        """Generate one image per (row of encoded text, seed) pair.

        The text need not belong to a caption.

        `first` has the same meaning as in `generate`.
        """
        if self.config.cache_interval > 1:
            first = None  # later steps need its deep features as well
        batches = []
        for start in range(0, len(seeds), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(seeds)))
            known = None if first is None else first[:, rows.start : rows.stop].flatten(0, 1)
            batches.append(self._generate_batch(text[rows], seeds[rows.start : rows.stop], known))
        return concatenate(batches, self.height, self.width)

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Return text embeddings (N, T, D) on the device, to which the denoiser attends."""
        return self.text_encoder(captions).hidden_NTD

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """This is (C, h, w) of one image's latent."""
        scale = self.checkpoint.vae_scale
        return int(self.checkpoint.unet.config.in_channels), self.height // scale, self.width // scale

    @torch.inference_mode()
    def _generate_batch(self, text: Text, seeds: Sequence[int], first: torch.Tensor | None) -> Generations:
        noise, generators = initial_latents(seeds, self.latent_shape)
        condition, steps = self.condition(text), self.config.steps
        latents = sample(
            self.denoiser, self.scheduler, condition, noise, generators, steps, self.hooks, first, self.count_calls
        )
        images, finite = self.decode(latents)
        signals, maps = collect(self.hooks)
        return Generations(images, signals, finite, maps)

    def count_calls(self, rows: int) -> None:
        """Note rows that go through the denoiser, for `calls`. Whoever sends them calls this."""
        self.calls += rows

    def condition(self, text: Text) -> Condition:
        """Return the conditions under which a batch of captions is sampled."""
        empty = self.empty_text()
        guided = max(1, round(self.config.guided_share * self.config.steps))
        return Condition(
            text_BTD=text.hidden_NTD,
            empty_1TD=None if empty is None else empty.hidden_NTD,
            guidance=self.config.guidance,
            pooled_BP=text.pooled_NP,
            empty_pooled_1P=None if empty is None else empty.pooled_NP,
            sizes_16=None if text.pooled_NP is None else size_ids(self.height, self.width, text.pooled_NP),
            guided=guided if guided < self.config.steps else None,
            ends_B=text.ends_N,
        )

    def empty_text(self) -> Text | None:
        """This is the text that guidance leads away from (N = 1): the empty or the negative caption.

        It is None if guidance is off.
        """
        if self.config.guidance <= 1:
            return None
        if self._empty_text is None:
            negative = self.config.negative_prompt
            self._empty_text = self.text_encoder.negative(negative) if negative else self.text_encoder.empty()
        return self._empty_text

    def _trial(self, count: int) -> None:
        """One denoiser step and the decoding of so many images, for their memory."""
        with torch.inference_mode():
            text = self.text_encoder([""])[[0] * count]
            noise, generators = initial_latents(range(count), self.latent_shape)
            latents = sample(self.denoiser, self.scheduler, self.condition(text), noise, generators, 1)
            self.decode.run(latents[:1].to(self.checkpoint.vae.dtype))


def _image_size(checkpoint: Checkpoint, config: GeneratorConfig) -> tuple[int, int]:
    native = checkpoint.unet.config.sample_size
    if native is None and not (config.height and config.width):
        raise ModelError(
            "its unet has no sample_size, so that its image size is not known",
            where=checkpoint.where,
            hint="set generator.height and generator.width",
        )
    native = native or 0
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


def negative_name(negative: str | None) -> str:
    """Return a negative caption's part in a specification's preprocessing: eight digits of its SHA-256."""
    return f"-negative{hashlib.sha256(negative.encode()).hexdigest()[:8]}" if negative else ""


def concatenate(batches: Sequence[Generations], height: int, width: int) -> Generations:
    """Join batches; of no batch, return no images of this size."""
    if not batches:
        return Generations(np.zeros((0, height, width, 3), np.uint8), {}, np.zeros(0, np.bool_))
    maps = [batch.maps_Bhw for batch in batches if batch.maps_Bhw is not None]
    return Generations(
        np.concatenate([batch.images_BHWC for batch in batches]),
        {name: np.concatenate([batch.signals[name] for batch in batches]) for name in batches[0].signals},
        np.concatenate([batch.finite_B for batch in batches]),
        None if not maps else np.concatenate(maps),
    )
