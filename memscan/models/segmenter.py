"""This module makes soft foreground masks as FB-Mem's release does: by BiRefNet through rembg (Di et al. 2025).

Image -> LANCZOS to a square -> divided by its own maximum -> ImageNet normalisation -> logits -> sigmoid -> min-max
over the image -> 8 bits (floor) -> LANCZOS back to the image's size. The 8 bits are part of the published path, and
make a mask survive its PNG unchanged. Both kinds of segmenter share the path, so that their masks are comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from memscan.config import SegmenterConfig
from memscan.errors import ConfigError, ModelError, Reason, RowReject
from memscan.models.folders import (
    HUB_PATTERNS,
    check_weights,
    first_line,
    folder_name,
    read_config,
    require_loaded,
    resolve_folder,
)
from memscan.models.mask_rules import BIREFNET, MaskRule, rule_of
from memscan.models.onnx_data import refuse_external_data
from memscan.models.onnx_files import float_type, open_session
from memscan.models.quiet import quiet_libraries
from memscan.models.specification import ModelSpec, hash_folder, read_verified

Float = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class Segmenter(Protocol):
    """A segmenter finds the foreground."""

    @property
    def spec(self) -> ModelSpec:
        """This specifies weights and preprocessing."""

    def segment(self, images: Sequence[Pixels]) -> list[Float]:
        """Return soft masks of RGB images (H, W, 3) of any sizes: float32 (H, W) in [0, 1], 1 = foreground.

        Raises:
            RowReject: `segmentation_failed`, the model's output for an image is not finite.
        """


class OnnxSegmenter:
    """This is a model in birefnet-general's file format: float32 [N, 3, S, S] in, logits [N, 1, S, S] out.

    A file that was exported in float16 gets its images in float16; its logits are read in float32.

    Args:
        config: `path`, and `sha256` where the file's hash is to be checked before parsing.
        device: "cpu" or "cuda"; without onnxruntime's CUDA provider the CPU is used, with a warning.
        threads: threads inside one operator.

    Raises:
        ModelError: no such file, not a segmenter's ONNX file, or of a fixed size other than configured.
        IntegrityError: the hash does not hold.
    """

    def __init__(self, config: SegmenterConfig, device: str = "cpu", *, threads: int = 1) -> None:
        data, digest = read_verified(config.path, config.sha256)
        refuse_external_data(data, config.path)
        self.config, self._rule = config, rule_of(config)
        self._session = open_session(data, config.path, device, threads)
        self._input, self._type, self._batched = _check_signature(self._session, config)
        self._output = _mask_output(self._session, self._rule.output, config.path)
        self.spec = ModelSpec("segmenter", folder_name(config.path), digest, _preprocessing(config))

    def segment(self, images: Sequence[Pixels]) -> list[Float]:
        """See `Segmenter.segment`."""
        size = self.config.batch_size if self._batched else 1
        masks: list[Float] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            inputs = np.stack([prepare(image, self.config.size, self._rule) for image in part])
            outputs = self._session.run(None, {self._input: inputs.astype(self._type, copy=False)})
            logits = np.asarray(outputs[self._output], dtype=np.float32)
            masks += _finish(logits, part, self.config, self._rule)
        return masks


def _check_signature(session: Any, config: SegmenterConfig) -> tuple[str, np.dtype[Any], bool]:
    """Return the name and type of the input, and whether it takes any number of images."""
    inputs = session.get_inputs()
    kind = float_type(inputs[0].type) if len(inputs) == 1 else None
    shape = list(inputs[0].shape) if inputs else []
    three_channels = len(shape) == 4 and (shape[1] == 3 or not isinstance(shape[1], int))
    if kind is None or not three_channels:
        raise ModelError(
            f"takes {[(one.name, one.type, one.shape) for one in inputs]}, not one float32 or float16 [N, 3, S, S]",
            where=config.path,
            hint="give a segmenter in birefnet-general's format, exported in float32 or float16",
        )
    if isinstance(shape[0], int) and shape[0] > 1:
        raise ModelError(
            f"takes exactly {shape[0]} images at once", where=config.path, hint="export it with a batch of 1 or any"
        )
    fixed = {side for side in shape[2:] if isinstance(side, int)}
    if fixed - {config.size}:
        raise ModelError(
            f"takes images of {shape[2]}x{shape[3]}, configured are {config.size}x{config.size}",
            where=config.path,
            hint=f"set segmenter.size to {sorted(fixed)[0]}",
        )
    return str(inputs[0].name), kind, not isinstance(shape[0], int)


def _mask_output(session: Any, wanted: int, path: str) -> int:
    """Return the number of the output that is the mask [N, 1, S, S]; raises ModelError if that has another shape."""
    outputs = session.get_outputs()
    if not -len(outputs) <= wanted < len(outputs):
        raise ModelError(f"has {len(outputs)} outputs", where=path, hint="set segmenter.output below that")
    shape = list(outputs[wanted].shape)
    if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 1):
        what = f"output {wanted % len(outputs)} of {len(outputs)} gives {shape}, not a mask [N, 1, S, S]"
        hint = (
            "a model of several classes does not segment a foreground; if it has several outputs, name one: "
            "segmenter.output"
        )
        raise ModelError(what, where=path, hint=hint)
    return wanted


class TorchSegmenter:
    """This is a torch network from normalised images [N, 3, S, S] to logits [N, 1, S, S].

    Of several outputs the last counts.

    Half precision is the network's only; its input is prepared, and its logits are read, in float32.

    Args:
        network: put on the device, and into `config.dtype`.
        spec: of its weights and preprocessing.
    """

    def __init__(self, config: SegmenterConfig, device: str, network: Any, spec: ModelSpec) -> None:
        import torch

        from memscan.models.devices import require_device

        self.config, self.spec, self._rule = config, spec, rule_of(config)
        self._device, self._dtype = require_device(device), getattr(torch, config.dtype)
        self._network = network.to(self._device, self._dtype)

    def segment(self, images: Sequence[Pixels]) -> list[Float]:
        """See `Segmenter.segment`."""
        import torch

        masks: list[Float] = []
        for start in range(0, len(images), self.config.batch_size):
            part = images[start : start + self.config.batch_size]
            inputs = torch.from_numpy(np.stack([prepare(image, self.config.size, self._rule) for image in part]))
            with torch.inference_mode():
                outputs = self._network(inputs.to(self._device).to(self._dtype))
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs[self._rule.output]
            masks += _finish(logits.float().cpu().numpy(), part, self.config, self._rule)
        return masks


class BiRefNetSegmenter(TorchSegmenter):
    """This is BiRefNet by transformers' remote code, with the same pre- and postprocessing as the ONNX file.

    Runs code from the model's repository: only with `trust_remote_code` and a pinned `revision`.

    Raises:
        ConfigError: the configuration does not allow remote code, or pins no revision.
        ModelError: the model cannot be loaded.
    """

    def __init__(self, config: SegmenterConfig, device: str = "cpu") -> None:
        if not config.trust_remote_code or config.revision is None:
            raise ConfigError(
                "birefnet runs code from the model's repository",
                where="segmenter",
                hint="read that code, then set segmenter.trust_remote_code: true and segmenter.revision to its commit;"
                " or use kind: onnx, which runs no code",
            )
        folder = resolve_folder(config.path, config.revision, (*HUB_PATTERNS, "*.py"))
        network = _load_remote(folder, config)
        rule = _preprocessing(config) + ("" if config.dtype == "float32" else f"-{config.dtype}")
        super().__init__(
            config, device, network, ModelSpec("segmenter", folder_name(config.path), hash_folder(folder), rule)
        )


def _load_remote(folder: Path, config: SegmenterConfig) -> Any:
    import torch
    from transformers import AutoModelForImageSegmentation

    _check_code(read_config(folder / "config.json"), config)
    check_weights(folder, "model")
    try:
        with quiet_libraries():
            model, info = AutoModelForImageSegmentation.from_pretrained(
                str(folder),
                trust_remote_code=True,
                code_revision=config.revision,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # remote code may raise anything
        raise ModelError(
            f"cannot load the segmenter ({type(error).__name__}: {first_line(error)})", where=config.path
        ) from error
    require_loaded(info, folder)
    return model.eval().requires_grad_(False)


def _check_code(facts: Mapping[str, Any], config: SegmenterConfig) -> None:
    """The code that was consented to is the folder's own: a configuration can also name another repository's."""
    listed = facts.get("auto_map")
    names = [str(name) for name in listed.values()] if isinstance(listed, dict) else []
    if any("--" in name or "/" in name for name in names):
        raise ModelError(
            "takes its code from another repository",
            where=config.path,
            hint="the revision of that code is not pinned: copy the code into the folder",
        )


def load_segmenter(config: SegmenterConfig, device: str = "cpu", *, threads: int = 1) -> Segmenter:
    """Load the configured segmenter.

    Args:
        threads: for `onnx`, threads inside one operator; torch's own setting rules `birefnet`.

    Raises:
        ConfigError, ModelError, IntegrityError: see `OnnxSegmenter` and `BiRefNetSegmenter`.
    """
    if config.kind == "birefnet":
        return BiRefNetSegmenter(config, device)
    return OnnxSegmenter(config, device, threads=threads)


def prepare(image_HWC: Pixels, size: int, rule: MaskRule = BIREFNET) -> Float:
    """Return the network input (3, size, size) of one RGB image.

    It is resized by LANCZOS, divided by its maximum or 255, and normalised.
    """
    resized = np.asarray(Image.fromarray(image_HWC).resize((size, size), Image.Resampling.LANCZOS))
    # In double precision on the 256 values there are, not on three million pixels: the same numbers, sooner.
    unit_V = np.arange(256) / (max(int(resized.max()), 1e-6) if rule.by_maximum else 255)
    mean, std = np.array(rule.mean), np.array(rule.std)
    values_CV = ((unit_V - mean[:, None]) / std[:, None]).astype(np.float32)
    return np.stack([values_V[resized[..., channel]] for channel, values_V in enumerate(values_CV)])


def mask_of(logits_HW: npt.NDArray[np.floating[Any]], size: tuple[int, int], *, sigmoid: bool = True) -> Float:
    """Return the soft mask (H, W) in [0, 1] from an output of any size.

    The steps are sigmoid, min-max, 8 bits, and LANCZOS to `size` = (H, W).

    Min-max has no meaning on a constant map: it is all foreground from probability one half on, otherwise none.

    Args:
        sigmoid: the output are logits; otherwise it is a probability already.
    """
    values = logits_HW.astype(np.float32)
    probability = _sigmoid(values) if sigmoid else values
    low, high = probability.min(), probability.max()
    unit = (probability - low) / (high - low) if high > low else np.full_like(probability, float(high >= 0.5))
    mask = Image.fromarray((unit * 255).astype(np.uint8))
    back = mask.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(back, dtype=np.float32) / np.float32(255)


def _sigmoid(x: Float) -> Float:
    """1 / (1 + e^-x) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def _finish(
    logits_N1SS: npt.NDArray[np.floating[Any]], images: Sequence[Pixels], config: SegmenterConfig, rule: MaskRule
) -> list[Float]:
    if logits_N1SS.ndim != 4 or logits_N1SS.shape[:2] != (len(images), 1):
        raise ModelError(f"gave {logits_N1SS.shape} for {len(images)} images, not [N, 1, S, S]", where=config.path)
    if not np.isfinite(logits_N1SS).all():
        raise RowReject(Reason.SEGMENTATION_FAILED, "the segmenter's output is not finite")
    return [
        mask_of(logits[0], image.shape[:2], sigmoid=rule.sigmoid)
        for logits, image in zip(logits_N1SS, images, strict=True)
    ]


def _preprocessing(config: SegmenterConfig) -> str:
    return f"{rule_of(config).name}{config.size}"
