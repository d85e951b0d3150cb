"""This module adds textual inversions (Gal et al. 2022, arXiv 2208.01618), words with trained embeddings, to encoders.

The formats of diffusers ({token: vector or vectors}), of A1111 (`emb_params`) and of SD XL trainers (`clip_l` and
`clip_g`) are read, as safetensors. A word of several vectors is written in a caption once, and stands for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memscan.config import InversionConfig
from memscan.errors import ModelError
from memscan.models.folders import first_line
from memscan.models.local_copy import stage_file
from memscan.models.specification import hash_file

_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
Expansions = tuple[tuple[str, str], ...]


def inversion_file(path: str) -> Path:
    """Return the safetensors file of a textual inversion: the path itself, or the one in the folder.

    Raises:
        ModelError: there is none, more than one, or it is a pickle.
    """
    place = stage_file(path) if path.endswith(".safetensors") else Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if len(files) != 1:
        what = f"holds {len(files)} safetensors files" if place.is_dir() else "no such file or folder"
        raise ModelError(what, where=path, hint="give the file of one textual inversion under textual_inversions")
    if files[0].suffix.lower() != ".safetensors":
        raise ModelError(
            "is no safetensors file",
            where=path,
            hint="only safetensors are loaded: convert it, because a pickle can run code",
        )
    return files[0]


def inversion_hash(inversion: InversionConfig) -> str:
    """Return the SHA-256 of everything that decides what a textual inversion does: its file and its word."""
    file = inversion_file(inversion.path)
    return hashlib.sha256(f"{hash_file(file)}\0{inversion.token or file.stem}".encode()).hexdigest()


def hash_with_inversions(digest: str, inversions: Sequence[InversionConfig]) -> str:
    """Return a checkpoint's hash together with those of its added words, or its own without any."""
    if not inversions:
        return digest
    return hashlib.sha256("\0".join([digest, *map(inversion_hash, inversions)]).encode()).hexdigest()


def add_inversions(encoders: Mapping[str, tuple[Any, Any]], inversions: Sequence[InversionConfig]) -> Expansions:
    """Add words to tokenizers and text encoders, in place.

    Args:
        encoders: by part ("text_encoder", "text_encoder_2"): tokenizer and network.

    Returns:
        (word, what stands for it in a caption) of the words that have several vectors.

    Raises:
        ModelError: a file cannot be read, is of another kind or another width, or its word is one already.
    """
    import torch

    found = []
    for inversion in inversions:
        file = inversion_file(inversion.path)
        word, by_part = _read(file, inversion, encoders)
        for part, (tokenizer, network) in encoders.items():
            vectors = by_part[part]
            names = [word, *(f"{word}_{at}" for at in range(1, len(vectors)))]
            known = tokenizer.get_vocab()
            if any(name in known for name in names):
                raise ModelError(f"its word {word!r} is in the tokenizer already", where=str(file), hint=_TOKEN)
            tokenizer.add_tokens(names)
            if len(tokenizer) > network.get_input_embeddings().num_embeddings:
                network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = network.get_input_embeddings().weight
            with torch.no_grad():
                for name, vector in zip(names, vectors, strict=True):
                    table[tokenizer.convert_tokens_to_ids(name)] = vector.to(table.dtype)
            network.requires_grad_(False)
        if len(names) > 1:
            found.append((word, " ".join(names)))
    return tuple(found)


_TOKEN = "give it another one with `token`"


def _read(file: Path, inversion: InversionConfig, encoders: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read the word, and its vectors (n, D) by part."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = str(file)
    try:
        tensors = load_file(where)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot be read as a textual inversion ({first_line(error)})", where=where) from error
    if tensors.keys() <= _PARTS.keys():
        word, by_part = file.stem, {_PARTS[name]: one for name, one in tensors.items()}
    elif len(tensors) == 1:
        ((name, one),) = tensors.items()
        word, by_part = (file.stem if name == "emb_params" else name), {"text_encoder": one}
    else:
        raise ModelError(
            f"is not a textual inversion: it has {len(tensors)} tensors",
            where=where,
            hint="a LoRA goes to generator.loras",
        )
    if set(by_part) != set(encoders):
        raise ModelError(
            f"has vectors for {' and '.join(sorted(by_part))}, the checkpoint has {' and '.join(sorted(encoders))}",
            where=where,
            hint="give one that was trained for this kind of model",
        )
    rows = {part: one.reshape(-1, one.shape[-1]) for part, one in by_part.items()}
    for part, (_, network) in encoders.items():
        width = network.get_input_embeddings().weight.shape[1]
        if rows[part].shape[1] != width:
            raise ModelError(
                f"its vectors have {rows[part].shape[1]} values, those of {part} {width}",
                where=where,
                hint="give one that was trained for this kind of model",
            )
    return inversion.token or word, rows
