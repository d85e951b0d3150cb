"""This module finds a LoRA's weights, and hashes everything that decides its effect.

It reads no tensors and imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from memscan.config import LoraConfig
from memscan.errors import ModelError
from memscan.models.local_copy import stage_file
from memscan.models.specification import hash_file


def lora_file(path: str) -> Path:
    """Return the safetensors file of a LoRA: the path itself, or the file in the folder.

    Raises:
        ModelError: there is none, or more than one.
    """
    place = stage_file(path) if path.endswith(".safetensors") else Path(path)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ModelError("is no safetensors file", where=path, hint="only safetensors weights are loaded")
        return place
    named = [place / name for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")]
    found = [file for file in named if file.is_file()] or sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        what = f"holds {len(found)} safetensors files" if place.is_dir() else "no such file or folder"
        raise ModelError(what, where=path, hint="give the file of one LoRA under generator.loras")
    return found[0]


def lora_hash(lora: LoraConfig) -> str:
    """Return the SHA-256 of everything that decides what a LoRA does.

    This is its file, the adapter's configuration beside it, and its scale.
    """
    file = lora_file(lora.path)
    beside = file.with_name("adapter_config.json")
    known = hash_file(beside) if beside.is_file() else ""
    return hashlib.sha256(f"{hash_file(file)}\0{known}\0{lora.scale!r}".encode()).hexdigest()


def hash_with(digest: str, loras: Sequence[LoraConfig]) -> str:
    """Return a checkpoint's hash together with those of what is fused into it; its own without any."""
    if not loras:
        return digest
    return hashlib.sha256("\0".join([digest, *map(lora_hash, loras)]).encode()).hexdigest()
