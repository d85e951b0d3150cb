"""This module calls any text-to-image pipeline of diffusers without changes.

Captions and seeds go in, images and the signals that apply come out.

It is for checkpoints that our own sampling loop does not know, such as transformer denoisers, latent consistency models
and flow matching. Each row has its own random generator on the host, seeded as everywhere, so that an image depends on
its caption and seed and not on its batch. Weights are loaded and checked part by part; safety checkers and watermarks
are never loaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memscan.config import GeneratorConfig
from memscan.errors import ConfigError, ModelError
from memscan.models.adapters import (
    JSON_PATTERNS,
    UNUSED_PARTS,
    Adapter,
    adapter_in,
    check_components,
    components,
)
from memscan.models.checkpoint import load_part, load_weights
from memscan.models.composition import resolve_checkpoint
from memscan.models.devices import require_device
from memscan.models.folders import folder_name, read_config
from memscan.models.generator import DTYPES, Generations, concatenate, negative_name
from memscan.models.hooks import DifferenceMapHook, NoiseNormHook, PredictionHook
from memscan.models.inversions import add_inversions, hash_with_inversions
from memscan.models.lora import NETWORKS, fuse
from memscan.models.lora_files import hash_with
from memscan.models.quiet import quiet_libraries
from memscan.models.schedulers import scheduler_from
from memscan.models.specification import ModelSpec, hash_folder
from memscan.models.stock_hooks import StockHooks

# Pipelines may change captions or sizes on their own, by what else is installed; a census does not let them.
_PLAIN = {"clean_caption": False, "use_resolution_binning": False}
_LIBRARIES = ("diffusers", "transformers")
GUIDANCE = ("guidance_scale", "distilled_guidance_scale", "prior_guidance_scale")
_NEEDED = ("prompt", "generator", "num_inference_steps")
_IMAGES = {"image", "images", "mask_image", "control_image", "init_image", "source_image"}
# Their noise comes from a source of their own, so that no row could be made again.
_UNREPEATABLE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


class StockGenerator:
    """This is a loaded pipeline with its sampling rule.

    It replaces `generator.Generator` for models that memscan's own loop does not know.

    Args:
        pipeline: a `DiffusionPipeline`, on its device.
        config: `steps`, `guidance` (as `guidance_scale`, whatever the pipeline makes of it), size, `batch_size`.
        adapter: of the checkpoint.
        name, sha256: of the checkpoint, for its specification.
        hooks: collectors of signals; noise norms and the map of the first step when not given, and for a model that
            predicts a velocity the norm of that difference, `velocity_norm`.

    Raises:
        ModelError: the pipeline takes no text, needs an input image, or draws noise that its generators do not give.
    """

    def __init__(
        self,
        pipeline: Any,
        config: GeneratorConfig,
        adapter: Adapter,
        *,
        name: str = "model",
        sha256: str = "",
        hooks: Sequence[PredictionHook] | None = None,
    ) -> None:
        self.pipeline, self.config, self.adapter = pipeline, config, adapter
        self.batch_size = config.batch_size
        self.sha256, self._name = sha256, name
        self._accepted = set(inspect.signature(type(pipeline).__call__).parameters)
        _check_pipeline(type(pipeline), self._accepted, config.path)
        self._guidance = guidance_arguments(self._accepted, config, transformer_config(pipeline))
        # Guidance of a second kind is only applied where there is a negative caption.
        self._negative = config.negative_prompt or (" " if self._guidance.get("true_cfg_scale", 0) > 1 else None)
        if config.negative_prompt is not None and "negative_prompt" not in self._accepted:
            raise ConfigError(
                f"is not taken by {type(pipeline).__name__}", where="generator.negative_prompt", hint="leave it out"
            )
        if config.clip_skip is not None and "clip_skip" not in self._accepted:
            raise ConfigError(
                f"is not taken by {type(pipeline).__name__}", where="generator.clip_skip", hint="leave it out"
            )
        # diffusers 0.42 looks for the inner network that CLIPTextModel has no more since transformers 5.6.
        inner = hasattr(pipeline, "text_encoder_2") or hasattr(getattr(pipeline, "text_encoder", None), "text_model")
        if config.clip_skip is not None and not inner:
            raise ConfigError(
                f"is not understood by {type(pipeline).__name__} with this version of transformers",
                where="generator.clip_skip",
                hint="leave it out, or leave out generator.adapter: memscan's own loop can skip layers",
            )
        _set_scheduler(pipeline, config)
        pipeline.set_progress_bar_config(disable=True)
        vae: Any = getattr(pipeline, "vae", None)
        if hasattr(vae, "enable_slicing"):  # an image at a time: a whole batch at once is the peak of memory
            vae.enable_slicing()
        family = "noise_norm" if adapter.predicts == "noise" else "velocity_norm"
        hooks = (NoiseNormHook(family), DifferenceMapHook()) if hooks is None else tuple(hooks)
        self.denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
        self._watch = StockHooks(self.denoiser, pipeline, hooks, velocity=adapter.predicts == "velocity")

    @classmethod
    def load(
        cls, config: GeneratorConfig, device: str = "cpu", hooks: Sequence[PredictionHook] | None = None
    ) -> StockGenerator:
        """Load the configured checkpoint onto a device.

        Raises:
            ModelError: the checkpoint is incomplete or broken, runs remote code, is no text-to-image pipeline, or the
                device is not there.
            ConfigError: a setting that only our own loop has.
        """
        place = require_device(device)
        adapter = adapter_in(resolve_checkpoint(config, JSON_PATTERNS), config)
        folder = resolve_checkpoint(config, _patterns(adapter))
        check_components(folder)
        with quiet_libraries():
            pipeline = _load_pipeline(folder, DTYPES[config.dtype])
        fuse({name: getattr(pipeline, name, None) for name in NETWORKS}, config.loras)
        if config.textual_inversions:
            _add_words(pipeline, config)
        pipeline = pipeline.to(place)
        digest = hash_with(hash_folder(folder, adapter.parts), config.loras)
        digest = hash_with_inversions(digest, config.textual_inversions)
        return cls(pipeline, config, adapter, name=folder_name(config.path), sha256=digest, hooks=hooks)

    @property
    def calls(self) -> int:
        """This is the number of rows that went through the denoiser, as in `calls.py`.

        It is 0 if the pipeline's denoiser is not known.
        """
        return self._watch.rows

    @property
    def spec(self) -> ModelSpec:
        """This specifies checkpoint and sampling rule."""
        rule, size = self.config, (self.config.height, self.config.width)
        shape = "native" if size == (None, None) else "x".join(str(edge or "native") for edge in size)
        preprocessing = (
            f"stock-{self.adapter.pipeline}-{type(self.pipeline.scheduler).__name__}-{rule.steps}"
            f"-cfg{rule.guidance:g}-{shape}-{rule.dtype}"
            f"{f'-clipskip{rule.clip_skip}' if rule.clip_skip else ''}{negative_name(rule.negative_prompt)}"
        )
        return ModelSpec("generator", self._name, self.sha256, preprocessing)

    def generate(self, captions: Sequence[str], seeds: Sequence[int], first: torch.Tensor | None = None) -> Generations:
        """Generate one image per (caption, seed) pair, in order, as `generator.Generator.generate` does.

        Args:
            first: not used, because a stock pipeline has no screen.

        Raises:
            ModelError: the output of the pipeline is not images.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions but {len(seeds)} seeds")
        if first is not None:
            raise ValueError("a stock pipeline cannot take a step up")
        size = self.batch_size
        spans = [slice(at, at + size) for at in range(0, len(seeds), size)]
        batches = [self._batch(list(captions[span]), seeds[span]) for span in spans]
        return concatenate(batches, self.config.height or 0, self.config.width or 0)

    @torch.no_grad()
    def _batch(self, captions: list[str], seeds: Sequence[int]) -> Generations:
        wanted = {
            "negative_prompt": None if self._negative is None else [self._negative] * len(captions),
            "prompt": captions,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": self.config.steps,
            **self._guidance,
            "num_images_per_prompt": 1,
            "clip_skip": self.config.clip_skip,
            "height": self.config.height,
            "width": self.config.width,
            "output_type": "np",
            **_PLAIN,
        }
        arguments = {key: value for key, value in wanted.items() if key in self._accepted and value is not None}
        with self._watch.batch(len(seeds)) as seen, quiet_libraries():
            images_BHWC = getattr(self.pipeline(**arguments), "images", None)
        if not isinstance(images_BHWC, np.ndarray) or images_BHWC.ndim != 4 or len(images_BHWC) != len(seeds):
            raise ModelError(f"{self.adapter.pipeline} makes something other than images", where=self.config.path)
        finite_B = seen.finite_B & np.isfinite(images_BHWC).all(axis=(1, 2, 3))
        levels = np.nan_to_num(images_BHWC.astype(np.float32)).clip(0, 1) * 255
        return Generations(levels.round().astype(np.uint8), seen.signals, finite_B, seen.maps_Bhw)


def _add_words(pipeline: Any, config: GeneratorConfig) -> None:
    """Textual inversions, for the pipelines that look for their words in captions."""
    from diffusers.loaders import TextualInversionLoaderMixin

    if not isinstance(pipeline, TextualInversionLoaderMixin):
        raise ConfigError(
            f"are not taken by {type(pipeline).__name__}", where="generator.textual_inversions", hint="leave them out"
        )
    pairs = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    encoders = {
        part: (getattr(pipeline, words), getattr(pipeline, part))
        for part, words in pairs.items()
        if hasattr(pipeline, part)
    }
    add_inversions(encoders, config.textual_inversions)


def transformer_config(pipeline: Any) -> Mapping[str, Any]:
    """Return the configuration of a pipeline's transformer; empty if it has none."""
    found: Mapping[str, Any] = getattr(getattr(pipeline, "transformer", None), "config", None) or {}
    return found


def guidance_arguments(
    accepted: Collection[str], config: GeneratorConfig, transformer: Mapping[str, Any]
) -> dict[str, float]:
    """Return the pipeline's own arguments for `generator.guidance`.

    Most take `guidance_scale`. Qwen-Image's is `true_cfg_scale`, and its `guidance_scale` is for distilled networks
    only (`guidance_embeds`), as in Flux.

    Args:
        accepted: parameters of the pipeline's call.

    Raises:
        ConfigError: guidance is asked for, and the pipeline has no argument for it.
    """
    if "true_cfg_scale" in accepted and not transformer.get("guidance_embeds"):
        return {"true_cfg_scale": config.guidance}
    names = [name for name in GUIDANCE if name in accepted]
    if not names and config.guidance > 1:
        raise ConfigError("has no effect: the pipeline has no guidance", where="generator.guidance", hint="set it to 1")
    return dict.fromkeys(names[:1], config.guidance)


def _patterns(adapter: Adapter) -> tuple[str, ...]:
    """Files of a hub id: of its components only, for repositories hold the same weights in other forms beside them."""
    kinds = ("*.json", "*.txt", "*.model", "model*.safetensors*", "diffusion_pytorch_model*.safetensors*")
    return ("model_index.json", *(f"{part}/{kind}" for part in adapter.parts[1:] for kind in kinds))


def _load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline with its networks loaded one by one: the library itself would leave missing weights random."""
    index = read_config(folder / "model_index.json")
    import diffusers

    kind: Any = getattr(diffusers, index["_class_name"], None)
    if not inspect.isclass(kind) or diffusers.DiffusionPipeline not in kind.__mro__:
        raise ModelError(f"diffusers has no pipeline {index['_class_name']}", where=str(folder))
    _check_pipeline(kind, set(inspect.signature(kind.__call__).parameters), str(folder))
    make: Any = kind
    parts: dict[str, Any] = {name: None for name in UNUSED_PARTS if name in index}
    if "requires_safety_checker" in inspect.signature(kind).parameters:
        parts["requires_safety_checker"] = False
    # A part that is listed as none (Stable Diffusion 3 without T5) is to be said, or the library looks for it.
    takes = inspect.signature(kind).parameters
    parts |= {name: None for name, value in index.items() if value == [None, None] and name in takes}
    for part, (library, name) in components(index).items():
        network = getattr(importlib.import_module(library), name, None) if library in _LIBRARIES else None
        if isinstance(network, type) and issubclass(network, torch.nn.Module):
            parts[part] = load_part(folder, part, lambda where, cls=network: load_weights(cls, where, dtype))  # type: ignore[misc]
    return load_part(
        folder.parent,
        folder.name,
        lambda whole: make.from_pretrained(
            str(whole), local_files_only=True, use_safetensors=True, dtype=dtype, **parts
        ),
    )


def _check_pipeline(kind: type, accepted: set[str], where: str) -> None:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    missing = [name for name in _NEEDED if name not in accepted]
    if missing or "num_frames" in accepted:
        what = f"takes no {missing[0]}" if missing else "makes videos"
        raise ModelError(f"is a {kind.__name__}, which {what}", where=where, hint="give a text-to-image checkpoint")
    # Some text-to-image pipelines take an image as well; they are known by name.
    if accepted & _IMAGES and kind not in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        raise ModelError(
            f"is a {kind.__name__}, which needs an input image", where=where, hint="give a text-to-image checkpoint"
        )


def _set_scheduler(pipeline: Any, config: GeneratorConfig) -> None:
    """The scheduler that was asked for, over the checkpoint's schedule. Raises ModelError if it does not fit."""
    if config.scheduler != "auto":
        known = {kind.__name__: kind for kind in pipeline.scheduler.compatibles}
        if config.scheduler not in known:
            raise ModelError(
                f"{config.scheduler} does not fit {type(pipeline.scheduler).__name__}, which the checkpoint has",
                where="generator.scheduler",
                hint=f"one of {', '.join(sorted(known))}, or auto",
            )
        kind = known[config.scheduler]
        pipeline.scheduler = scheduler_from(kind, pipeline.scheduler.config, where="generator.scheduler")
    name = type(pipeline.scheduler).__name__
    if name in _UNREPEATABLE:
        raise ModelError(
            f"{name} draws its own noise, so that no generation could be repeated",
            where="generator.scheduler",
            hint="set generator.scheduler to another one",
        )
