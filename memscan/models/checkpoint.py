"""A Stable Diffusion checkpoint: the four components of a diffusers folder, loaded with the stock classes.

Nothing about sizes is assumed: token count, latent channels and the VAE's reduction are read from the checkpoint. No
safety checker is needed or loaded: what the model would have hidden is what a census is looking for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from memscan.errors import ModelError
from memscan.models.folders import (
    CHECKPOINT_PARTS,
    check_checkpoint,
    first_line,
    folder_name,
    read_config,
    require_loaded,
    resolve_folder,
)
from memscan.models.quiet import quiet_libraries
from memscan.models.specification import hash_folder

PARTS = CHECKPOINT_PARTS
_HUB_PATTERNS = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "text_encoder/config.json",
    "text_encoder/model*.safetensors*",
    "unet/config.json",
    "unet/diffusion_pytorch_model*.safetensors*",
    "vae/config.json",
    "vae/diffusion_pytorch_model*.safetensors*",
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """Loaded components in evaluation mode, without gradients.

    Args:
        max_tokens: length that captions are padded and truncated to.
        vae_scale: image pixels for a latent pixel, along one edge.
        scheduler_config: the checkpoint's own scheduler configuration.
        where: folder or hub id, for messages.
        sha256: over `PARTS`, see `specification.hash_folder`.
    """

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    max_tokens: int
    vae_scale: int
    where: str
    name: str
    sha256: str


def load_checkpoint(path: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Load a `StableDiffusionPipeline` folder or pinned hub id (SD 1.x and 2.x).

    Weights stored in another precision are converted to `dtype`.

    Raises:
        ModelError: a part is missing, broken or of another kind; names the part and the folder.
    """
    folder = resolve_folder(path, revision, _HUB_PATTERNS)
    check_checkpoint(folder)
    with quiet_libraries():
        tokenizer = _load(folder, "tokenizer", _load_tokenizer)
        text_encoder = _load(folder, "text_encoder", lambda part: _load_weights(CLIPTextModel, part, dtype))
        unet = _load(folder, "unet", lambda part: _load_weights(UNet2DConditionModel, part, dtype))
        vae = _load(folder, "vae", lambda part: _load_weights(AutoencoderKL, part, dtype))
    _check_fit(folder, tokenizer, text_encoder, unet, vae)
    if device.type == "cuda":  # convolutions there want channels last; on a CPU it gains nothing (measured)
        unet.to(memory_format=torch.channels_last)
    return Checkpoint(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(device),
        unet=unet.to(device),
        vae=vae.to(device),
        scheduler_config=read_config(folder / "scheduler" / "scheduler_config.json"),
        max_tokens=min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings),
        vae_scale=2 ** (len(vae.config.block_out_channels) - 1),
        where=path,
        name=folder_name(path),
        sha256=hash_folder(folder, PARTS),
    )


def _load(folder: Path, part: str, loader: Callable[[Path], _T]) -> _T:
    try:
        return loader(folder / part)
    except ModelError:
        raise
    except Exception as error:  # the libraries raise every kind, down to KeyError, for a bad config or vocabulary
        raise ModelError(
            f"cannot load {part} ({type(error).__name__}: {first_line(error)})", where=str(folder)
        ) from error


def _load_tokenizer(part: Path) -> Any:
    # Without its files the class makes an empty vocabulary of three tokens instead of failing.
    whole = (part / "tokenizer.json").is_file()
    if not whole and not ((part / "vocab.json").is_file() and (part / "merges.txt").is_file()):
        raise ModelError("has neither tokenizer.json nor vocab.json with merges.txt", where=str(part))
    return CLIPTokenizer.from_pretrained(str(part), local_files_only=True)


def _load_weights(kind: Any, part: Path, dtype: torch.dtype) -> Any:
    read_config(part / "config.json")
    model, info = kind.from_pretrained(
        str(part), local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=dtype
    )
    require_loaded(info, part)
    return model.eval().requires_grad_(False)


def _check_fit(folder: Path, tokenizer: Any, text_encoder: Any, unet: Any, vae: Any) -> None:
    pairs = {
        "unet takes {} latent channels, vae makes {}": (unet.config.in_channels, vae.config.latent_channels),
        "unet attends to text of width {}, text_encoder makes {}": (
            unet.config.cross_attention_dim,
            text_encoder.config.hidden_size,
        ),
    }
    for text, (one, other) in pairs.items():
        if one != other:
            raise ModelError(
                text.format(one, other), where=str(folder), hint="only text-to-image checkpoints are supported"
            )
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise ModelError(
            f"tokenizer has {len(tokenizer)} tokens, text_encoder {text_encoder.config.vocab_size}", where=str(folder)
        )
    if unet.config.time_cond_proj_dim is not None or unet.config.addition_embed_type is not None:
        raise ModelError("unet takes conditions other than text and time", where=str(folder))
