"""This module makes copy-detection embeddings: unit vectors of images, whose inner product is their similarity.

The preprocessing is part of the measurement. That of SSCD resizes the small edge to 288 pixels and keeps the aspect, or
resizes to a square of 320 pixels, by antialiased bilinear resampling (Pillow's, which is also what
torchvision applies to PIL images), ImageNet normalisation, and no crop.
"""

from __future__ import annotations

import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from memscan.config import EmbedderConfig
from memscan.errors import ConfigError, MemscanError, ModelError, Reason, RowReject
from memscan.models.devices import require_device
from memscan.models.folders import (
    check_weights,
    first_line,
    folder_name,
    last_line,
    read_config,
    require_loaded,
    resolve_folder,
)
from memscan.models.onnx_data import refuse_external_data
from memscan.models.onnx_files import float_type, open_session
from memscan.models.quiet import quiet_libraries
from memscan.models.specification import ModelSpec, hash_folder, read_verified

# Longer images are squeezed: with the aspect kept, a line of 1 by 10,000 pixels would be 288 by 2,880,000.
MAX_ASPECT = 8
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Float = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class Embedder(Protocol):
    """An embedder maps images to a space where copies are near."""

    @property
    def spec(self) -> ModelSpec:
        """This specifies weights and preprocessing."""

    @property
    def dimension(self) -> int:
        """This is the length of a vector."""

    def embed(self, images: Sequence[Pixels]) -> Float:
        """Return unit vectors (N, D) float32 of RGB images (H, W, 3) of any sizes, in order.

        Raises:
            RowReject: `embedding_failed`, the vector of an image is not finite.
        """


class _BatchEmbedder(ABC):
    """This is what the kinds share: batches of equal shape through a network, rows back in order at unit length."""

    def __init__(self, config: EmbedderConfig, spec: ModelSpec) -> None:
        self.config, self._spec = config, spec
        self._dimension = self._probe()

    @property
    def spec(self) -> ModelSpec:
        """See `Embedder.spec`."""
        return self._spec

    @property
    def dimension(self) -> int:
        """See `Embedder.dimension`."""
        return self._dimension

    def embed(self, images: Sequence[Pixels]) -> Float:
        """See `Embedder.embed`."""
        rows_by_shape: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            rows_by_shape.setdefault(self._shape(image), []).append(row)
        vectors_ND = np.zeros((len(images), self.dimension), dtype=np.float32)
        for rows in rows_by_shape.values():
            for start in range(0, len(rows), self.config.batch_size):
                part = rows[start : start + self.config.batch_size]
                vectors = self._forward(np.stack([self._prepare(images[row]) for row in part]))
                if vectors.shape != (len(part), self.dimension):  # NumPy would give one vector to all of them
                    raise ModelError(
                        f"gives {list(vectors.shape)} for {len(part)} images, not {[len(part), self.dimension]}",
                        where=self.config.path,
                        hint="its batch is built in: set embedder.batch_size to 1, or export it for any batch",
                    )
                vectors_ND[part] = vectors
        return _unit(vectors_ND)

    def _probe(self) -> int:
        """Return the vectors' length, found by embedding one grey image."""
        side = self.config.size
        pixels = self._prepare(np.full((side, side, 3), 128, dtype=np.uint8))[None]
        try:
            vector = self._forward(pixels)
        except MemscanError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            built_in = any(word in str(error) for word in ("Half", "BFloat16", "cuda"))
            raise ModelError(
                f"cannot embed an image of shape {list(pixels.shape)} ({last_line(error)})",
                where=self.config.path,
                hint="a precision or a device is built into it: export it in float32 on the CPU" if built_in else None,
            ) from error
        if vector.ndim != 2 or len(vector) != 1:
            raise ModelError(f"gives {list(vector.shape)} for one image, not [1, D]", where=self.config.path)
        return int(vector.shape[1])

    @abstractmethod
    def _forward(self, pixels_BCHW: Float) -> Float:
        """Return vectors (B, D) of prepared images."""

    def _shape(self, image_HWC: Pixels) -> tuple[int, int]:
        """Return a key that is equal only for images that are equal in shape once prepared."""
        return resized_size((image_HWC.shape[1], image_HWC.shape[0]), self.config)

    def _prepare(self, image_HWC: Pixels) -> Float:
        """Network input (3, h, w)."""
        return prepare(image_HWC, self.config)


class _TorchEmbedder(_BatchEmbedder):
    """This is a torch network on a device."""

    def __init__(self, config: EmbedderConfig, device: str, network: Any, spec: ModelSpec) -> None:
        self._device = require_device(device)
        self._network = network.to(self._device)
        super().__init__(config, spec)

    def _forward(self, pixels_BCHW: Float) -> Float:
        with torch.inference_mode():
            output = self._run(torch.from_numpy(pixels_BCHW).to(self._device))
        array: Float = output.float().cpu().numpy()
        return array

    @abstractmethod
    def _run(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Return vectors (B, D) of prepared images."""


class OnnxEmbedder(_BatchEmbedder):
    """This is an ONNX file from normalised float32 [N, 3, H, W] to [N, D]; of several outputs the first counts.

    A file that was exported in float16 gets its images in float16; its vectors are read in float32.

    Raises:
        IntegrityError: a hash is configured and does not hold.
        ModelError: no such file, not an ONNX file of an embedder, or its weights lie in another file.
    """

    def __init__(self, config: EmbedderConfig, device: str = "cpu") -> None:
        data, digest = read_verified(config.path, config.sha256)
        refuse_external_data(data, config.path)
        self._session = open_session(data, config.path, device, threads=1)
        inputs, shape = self._session.get_inputs(), list(self._session.get_outputs()[0].shape)
        kind = float_type(inputs[0].type) if len(inputs) == 1 else None
        if kind is None or len(inputs[0].shape) != 4 or len(shape) != 2:
            raise ModelError(
                f"takes {[(one.name, one.type, one.shape) for one in inputs]} and gives {shape}, not one float32 "
                "or float16 [N, 3, H, W] and [N, D]",
                where=config.path,
                hint="give an image encoder, exported in float32 or float16 with its pooling",
            )
        self._input, self._type = str(inputs[0].name), kind
        super().__init__(config, ModelSpec("embedder", config.name, digest, preprocessing_name(config)))

    def _forward(self, pixels_BCHW: Float) -> Float:
        return np.asarray(
            self._session.run(None, {self._input: pixels_BCHW.astype(self._type, copy=False)})[0], dtype=np.float32
        )


class TorchScriptEmbedder(_TorchEmbedder):
    """This is a TorchScript model from normalised float32 [N, 3, H, W] to [N, D], which is SSCD's file format.

    TorchScript is executable code, so the file's sha256 must be pinned, and is checked before it is parsed.

    Raises:
        ConfigError: no sha256 is configured.
        IntegrityError: the hash does not hold.
        ModelError: no such file, not TorchScript, or not an embedder.
    """

    def __init__(self, config: EmbedderConfig, device: str = "cpu") -> None:
        if config.sha256 is None:
            raise ConfigError(
                "TorchScript is executable code and needs its sha256",
                where="embedder.sha256",
                hint=f"set the hash that the publisher of {Path(config.path).name} gives for it",
            )
        data, digest = read_verified(config.path, config.sha256)
        spec = ModelSpec("embedder", config.name, digest, preprocessing_name(config))
        super().__init__(config, device, _load_torchscript(data, config.path), spec)

    def _run(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        output = self._network(pixels_BCHW)
        if not isinstance(output, torch.Tensor):
            raise ModelError(f"gives a {type(output).__name__}, not a tensor [N, D]", where=self.config.path)
        return output


def _load_torchscript(data: bytes, path: str) -> Any:
    try:
        with warnings.catch_warnings():
            # torch recommends its successor for new models; the published weights are in this format.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        weights_alone = "constants.pkl" in str(error)
        hint = "is it the weights alone? SSCD's TorchScript files end in .torchscript.pt" if weights_alone else None
        if not data.startswith(b"PK"):
            hint = "TorchScript files are zip archives; an ONNX file is read with embedder.kind: onnx"
        raise ModelError(f"not a loadable TorchScript model ({first_line(error)})", where=path, hint=hint) from error


class TransformersEmbedder(_TorchEmbedder):
    """This is any transformers image encoder, with its image embedding or else its pooled output.

    Images are prepared by the folder's own image processor where it has one (`preprocessor_config.json`), else by the
    configuration's resize and normalisation, as for TorchScript.

    Raises:
        ModelError: the folder is incomplete, or the model has no image embedding.
    """

    def __init__(self, config: EmbedderConfig, device: str = "cpu") -> None:
        folder = resolve_folder(config.path, config.revision)
        self._processor = _load_processor(folder)
        name = config.name if "name" in config.model_fields_set else folder_name(config.path)
        rule = preprocessing_name(config) if self._processor is None else type(self._processor).__name__
        network = _load_encoder(folder, config.path)
        super().__init__(config, device, network, ModelSpec("embedder", name, hash_folder(folder), rule))

    def _run(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if hasattr(self._network, "get_image_features"):
            return _pooled(self._network.get_image_features(pixel_values=pixels_BCHW), self.config.path)
        return _pooled(self._network(pixel_values=pixels_BCHW), self.config.path)

    def _shape(self, image_HWC: Pixels) -> tuple[int, int]:
        if self._processor is None:
            return resized_size((image_HWC.shape[1], image_HWC.shape[0]), self.config)
        return image_HWC.shape[1], image_HWC.shape[0]

    def _prepare(self, image_HWC: Pixels) -> Float:
        if self._processor is None:
            return prepare(image_HWC, self.config)
        values = self._processor(images=Image.fromarray(image_HWC), return_tensors="np")["pixel_values"]
        return np.asarray(values[0], dtype=np.float32)


def _pooled(output: Any, path: str) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if value is not None:
            flat: torch.Tensor = value.flatten(1)
            return flat
    raise ModelError("has neither image_embeds nor pooler_output", where=path, hint="give an image encoder")


def _load_encoder(folder: Path, path: str) -> Any:
    import transformers

    architecture = (read_config(folder / "config.json").get("architectures") or [""])[0]
    check_weights(folder, "model")
    # AutoModel leaves out the projection into the space in which a CLIP-like model was trained to compare.
    projected = architecture.endswith("WithProjection") and hasattr(transformers, architecture)
    kind: Any = getattr(transformers, architecture) if projected else transformers.AutoModel
    try:
        with quiet_libraries():
            model, info = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises every kind for a bad folder
        raise ModelError(
            f"cannot load the image encoder ({type(error).__name__}: {first_line(error)})", where=path
        ) from error
    require_loaded(info, folder)
    return model.eval().requires_grad_(False)


def _load_processor(folder: Path) -> Any | None:
    if not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    try:
        # The Pillow implementation: torchvision is no requirement, and results do not depend on its presence.
        kind: Any = AutoImageProcessor
        with quiet_libraries():
            return kind.from_pretrained(str(folder), local_files_only=True, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(f"cannot load the image processor ({first_line(error)})", where=str(folder)) from error


def load_embedder(config: EmbedderConfig, device: str = "cpu") -> Embedder:
    """Load the configured embedder.

    Raises:
        ConfigError, ModelError, IntegrityError: see `TorchScriptEmbedder`, `TransformersEmbedder`, `OnnxEmbedder`.
    """
    if config.kind == "transformers":
        return TransformersEmbedder(config, device)
    if config.kind == "onnx":
        return OnnxEmbedder(config, device)
    return TorchScriptEmbedder(config, device)


def prepare(image_HWC: Pixels, config: EmbedderConfig) -> Float:
    """Return the network input (3, h, w) of one RGB image: resized, in [0, 1], normalised."""
    image = Image.fromarray(image_HWC)
    size = resized_size(image.size, config)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    unit = np.asarray(image, dtype=np.float32) / np.float32(255)
    normalised = (unit - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def resized_size(size: tuple[int, int], config: EmbedderConfig) -> tuple[int, int]:
    """Return (width, height) after resizing.

    It is a square, or the smaller edge is `config.size` and the longer one is rounded down.
    """
    if config.resize == "square":
        return config.size, config.size
    width, height = size
    longer = min(int(config.size * max(size) / min(size)), config.size * MAX_ASPECT)
    return (config.size, longer) if width <= height else (longer, config.size)


def preprocessing_name(config: EmbedderConfig) -> str:
    """Resize rule and normalisation in a few words, for the specification."""
    values = (config.mean, config.std)
    numbers = "imagenet" if values == IMAGENET else "_".join(f"{value:g}" for triple in values for value in triple)
    return f"{config.resize}{config.size}-bilinear-{numbers}"


def _unit(vectors_ND: Float) -> Float:
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms_N1[:, 0]) & (norms_N1[:, 0] > 0)))
    if bad.size:
        raise RowReject(Reason.EMBEDDING_FAILED, f"the vector of image {bad[0]} of {len(vectors_ND)} has no direction")
    return np.asarray(vectors_ND / norms_N1, dtype=np.float32)
