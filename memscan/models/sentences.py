"""This module has text encoders for clustering: captions go in, and one vector per caption comes out.

The model's own text encoder says which captions are alike *to the model under census*; a sentence encoder says which
are alike to people. Both are stock transformers models with safetensors weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from memscan.errors import ModelError
from memscan.models.devices import require_device
from memscan.models.folders import first_line, folder_name, read_config, require_loaded, resolve_folder
from memscan.models.quiet import quiet_libraries
from memscan.models.specification import ModelSpec, hash_folder

BATCH = 64
# Hidden states are 77 x 768 = 59,136 numbers a caption in SD 1.x: 500 captions fit, 50,000 do not. Longer ones are
# projected at random to so many, which keeps distances within a few percent (Johnson & Lindenstrauss 1984).
HIDDEN_SIZE = 4096

Float = npt.NDArray[np.float32]


class TextEncoder(Protocol):
    """A text encoder maps captions to a space where similar ones are near."""

    @property
    def spec(self) -> ModelSpec:
        """This specifies weights and pooling."""

    def encode(self, captions: Sequence[str], hidden: bool = False) -> tuple[Float, Float | None]:
        """Return vectors (N, D) and, if asked for, flattened hidden states (N, H); float32, in order."""


class ModelTextEncoder:
    """This is the text encoder of a Stable Diffusion checkpoint, with its pooled output at the end token.

    Args:
        path, revision: diffusers folder or pinned hub id; only its tokenizer and text_encoder are read.

    Raises:
        ModelError: they are missing, broken or of another kind.
    """

    def __init__(self, path: str, revision: str | None = None, device: str = "cpu") -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        patterns = ("tokenizer/*", "text_encoder/config.json", "text_encoder/model*.safetensors*")
        folder = resolve_folder(path, revision, patterns)
        self._device = require_device(device)
        with quiet_libraries():
            self._tokenizer = _load(CLIPTokenizer, folder / "tokenizer")
            model = _load_weights(CLIPTextModel, folder / "text_encoder")
        self._model = model.to(self._device)
        self._length = min(self._tokenizer.model_max_length, model.config.max_position_embeddings)
        sha256 = hash_folder(folder, ("tokenizer", "text_encoder"))
        self._spec = ModelSpec("text", folder_name(path), sha256, f"pooled-{self._length}tokens")
        self._projection: torch.Tensor | None = None

    @property
    def spec(self) -> ModelSpec:
        """See `TextEncoder.spec`."""
        return self._spec

    @torch.inference_mode()
    def encode(self, captions: Sequence[str], hidden: bool = False) -> tuple[Float, Float | None]:
        """See `TextEncoder.encode`. Hidden states are the last layer's, all tokens, padding included (Di et al.)."""
        pooled, states = [], []
        for start in range(0, len(captions), BATCH):
            tokens = self._tokenizer(
                list(captions[start : start + BATCH]),
                padding="max_length",
                max_length=self._length,
                truncation=True,
                return_tensors="pt",
            )
            ids = tokens.input_ids.to(self._device)
            masked = getattr(self._model.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self._device) if masked else None
            found = self._model(ids, attention_mask=mask)
            pooled.append(found.pooler_output.float().cpu())
            if hidden:
                states.append(self._projected(found.last_hidden_state.float().flatten(1)).cpu())
        return _stacked(pooled), _stacked(states) if hidden else None

    def _projected(self, states_BH: torch.Tensor) -> torch.Tensor:
        if states_BH.shape[1] <= HIDDEN_SIZE:
            return states_BH
        if self._projection is None:
            drawn = torch.Generator().manual_seed(0)
            size = (states_BH.shape[1], HIDDEN_SIZE)
            self._projection = (torch.randn(size, generator=drawn) / HIDDEN_SIZE**0.5).to(states_BH.device)
        return states_BH @ self._projection


class SentenceEncoder:
    """This is any transformers encoder with a mean over its tokens.

    sentence-transformers models are pooled in this way by default.

    Args:
        path, revision: folder or pinned hub id with safetensors weights; no remote code is run.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, path: str, revision: str | None = None, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = resolve_folder(path, revision, ("*.json", "*.txt", "*.model", "model*.safetensors*"))
        self._device = require_device(device)
        with quiet_libraries():
            self._tokenizer = _load(AutoTokenizer, folder)
            model = _load_weights(AutoModel, folder)
        self._model = model.to(self._device)
        limit = getattr(model.config, "max_position_embeddings", 512)
        self._length = int(min(self._tokenizer.model_max_length, limit, 512))
        self._spec = ModelSpec("text", folder_name(path), hash_folder(folder), f"mean-{self._length}tokens")

    @property
    def spec(self) -> ModelSpec:
        """See `TextEncoder.spec`."""
        return self._spec

    @torch.inference_mode()
    def encode(self, captions: Sequence[str], hidden: bool = False) -> tuple[Float, Float | None]:
        """See `TextEncoder.encode`; there are no hidden states of a fixed length, so None for them."""
        rows = []
        for start in range(0, len(captions), BATCH):
            tokens = self._tokenizer(
                list(captions[start : start + BATCH]),
                padding=True,
                max_length=self._length,
                truncation=True,
                return_tensors="pt",
            ).to(self._device)
            states = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            rows.append(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
        return _stacked(rows), None


def load_text_encoder(kind: str, path: str, revision: str | None = None, device: str = "cpu") -> TextEncoder:
    """Load a text encoder of a `kind`: "model" (a Stable Diffusion checkpoint) or "sentence".

    Raises ModelError as the classes do.
    """
    return (ModelTextEncoder if kind == "model" else SentenceEncoder)(path, revision, device)


def _stacked(rows: list[torch.Tensor]) -> Float:
    return torch.cat(rows).numpy() if rows else np.zeros((0, 1), np.float32)


def _load(kind: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError("no such part of the model", where=str(folder))
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise every kind for a bad vocabulary
        raise ModelError(
            f"cannot load the tokenizer ({type(error).__name__}: {first_line(error)})", where=str(folder)
        ) from error


def _load_weights(kind: Any, folder: Path) -> Any:
    read_config(folder / "config.json")
    try:
        model, info = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:
        raise ModelError(
            f"cannot load the text encoder ({type(error).__name__}: {first_line(error)})", where=str(folder)
        ) from error
    require_loaded(info, folder)
    return model.eval().requires_grad_(False)
