"""This module loads a Stable Diffusion checkpoint: the components of a diffusers folder, with the stock classes.

SD 1.x and 2.x have four components, and SD XL has a second text encoder and tokenizer. Nothing about sizes is assumed:
token count, latent channels and the VAE's reduction are read from the checkpoint. No safety checker is needed or
loaded, because a census looks for exactly what it would hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from memscan.config import InversionConfig, LoraConfig
from memscan.errors import ModelError
from memscan.models.folders import (
    CHECKPOINT_PARTS,
    DOUBLE_PARTS,
    check_checkpoint,
    check_weights,
    find_weights,
    first_line,
    folder_name,
    is_double,
    read_config,
    require_loaded,
    resolve_folder,
)
from memscan.models.inversions import Expansions, add_inversions, hash_with_inversions
from memscan.models.lora import fuse
from memscan.models.lora_files import hash_with
from memscan.models.quiet import quiet_libraries
from memscan.models.specification import hash_folder

PARTS = CHECKPOINT_PARTS
HUB_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "tokenizer_2/*",
    "text_encoder/config.json",
    "text_encoder/model*.safetensors*",
    "text_encoder_2/config.json",
    "text_encoder_2/model*.safetensors*",
    "unet/config.json",
    "unet/diffusion_pytorch_model*.safetensors*",
    "vae/config.json",
    "vae/diffusion_pytorch_model*.safetensors*",
)
# What a UNet is given besides text and time: classes (unCLIP, upscalers), or image embeddings (IP-Adapter).
_CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """These are loaded components in evaluation mode, without gradients.

    Args:
        max_tokens: length that captions are padded and truncated to.
        vae_scale: image pixels for a latent pixel, along one edge.
        scheduler_config: the checkpoint's own scheduler configuration.
        where: folder or hub id, for messages.
        sha256: over `PARTS`, see `specification.hash_folder`.
        tokenizer_2, text_encoder_2: of SD XL, otherwise None.
        zero_empty: SD XL's setting that the empty caption's embedding is all zeros.
        expansions: (word, words that stand for it) of textual inversions with several vectors.
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
    tokenizer_2: Any = None
    text_encoder_2: Any = None
    zero_empty: bool = False
    expansions: Expansions = ()


def load_checkpoint(
    path: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    loras: Sequence[LoraConfig] = (),
    inversions: Sequence[InversionConfig] = (),
) -> Checkpoint:
    """Load a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` folder or pinned hub id.

    Weights stored in another precision are converted to `dtype`, except that SD XL's VAE, which overflows in float16,
    is kept in float32 then, as the stock pipeline does.

    Args:
        loras: fused into UNet and text encoders; the checkpoint's hash covers them.
        inversions: words that are added to the text encoders; the hash covers them as well.

    Raises:
        ModelError: a part is missing, broken or of another kind; names the part and the folder.
    """
    folder = resolve_folder(path, revision, HUB_FILES)
    index = check_checkpoint(folder)
    double = is_double(index)
    with quiet_libraries():
        tokenizer = load_part(folder, "tokenizer", _load_tokenizer)
        text_encoder = load_part(folder, "text_encoder", lambda part: load_weights(CLIPTextModel, part, dtype))
        unet = load_part(folder, "unet", lambda part: load_weights(UNet2DConditionModel, part, dtype))
        vae = load_part(folder, "vae", lambda part: load_weights(AutoencoderKL, part, dtype))
        tokenizer_2 = load_part(folder, "tokenizer_2", _load_tokenizer) if double else None
        text_encoder_2 = (
            load_part(folder, "text_encoder_2", lambda part: load_weights(CLIPTextModelWithProjection, part, dtype))
            if double
            else None
        )
    _check_fit(folder, tokenizer, text_encoder, unet, vae, text_encoder_2)
    if double:
        _check_double(folder, unet, tokenizer_2, text_encoder_2)
        if dtype == torch.float16 and vae.config.force_upcast:
            vae = vae.float()
    fuse({"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}, loras)
    encoders = {"text_encoder": (tokenizer, text_encoder)}
    if text_encoder_2 is not None:
        encoders["text_encoder_2"] = (tokenizer_2, text_encoder_2)
    digest = hash_with(hash_folder(folder, (*PARTS, *DOUBLE_PARTS) if double else PARTS), loras)
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
        sha256=hash_with_inversions(digest, inversions),
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2 if text_encoder_2 is None else text_encoder_2.to(device),
        expansions=add_inversions(encoders, inversions),
        zero_empty=bool(index.get("force_zeros_for_empty_prompt", True)) and double,
    )


def caption_limit(folder: Path) -> tuple[Any, int]:
    """Return the first tokenizer of a folder, and how many tokens its encoder takes, with begin and end.

    Raises:
        ModelError: the tokenizer is missing or broken.
    """
    with quiet_libraries():
        tokenizer = load_part(folder, "tokenizer", _load_tokenizer)
    positions = read_config(folder / "text_encoder" / "config.json").get("max_position_embeddings")
    return tokenizer, min(tokenizer.model_max_length, int(positions or 77))


def load_unet(part: Path, dtype: torch.dtype | Literal["stored"]) -> Any:
    """Load a denoiser alone, on the host, in evaluation mode and without gradients.

    Args:
        part: folder of a `UNet2DConditionModel`, such as `CHECKPOINT/unet`.
        dtype: precision to load in; "stored" for that of the first weight in its files.

    Raises:
        ModelError: it is missing or broken.
    """

    def load(found: Path) -> Any:
        precision = _stored_dtype(found) if dtype == "stored" else dtype
        return load_weights(UNet2DConditionModel, found, precision)

    with quiet_libraries():
        return load_part(part.parent, part.name, load)


def _stored_dtype(part: Path) -> torch.dtype:
    file = find_weights(part, "diffusion_pytorch_model").files[0]
    with safe_open(str(file), framework="pt") as weights:
        dtype: torch.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return dtype


def load_part(folder: Path, part: str, loader: Callable[[Path], _T]) -> _T:
    """Return what `loader` makes of a part of a checkpoint.

    Raises ModelError, with the library's first words, if it fails.
    """
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


def load_weights(kind: Any, part: Path, dtype: torch.dtype) -> Any:
    """Load a model of a class of diffusers or transformers, in evaluation mode, without gradients.

    Raises:
        ModelError: weights are missing or of another shape: the library would have left them random.
    """
    read_config(part / "config.json")
    stem = "model" if kind.__module__.startswith("transformers") else "diffusion_pytorch_model"
    weights = check_weights(part, stem)
    model, info = kind.from_pretrained(
        str(part),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        dtype=dtype,
        variant=weights.variant,
    )
    require_loaded(info, part)
    return model.eval().requires_grad_(False)


def _check_fit(folder: Path, tokenizer: Any, text_encoder: Any, unet: Any, vae: Any, text_encoder_2: Any) -> None:
    width = text_encoder.config.hidden_size + (text_encoder_2.config.hidden_size if text_encoder_2 is not None else 0)
    pairs = {
        "unet takes {} latent channels, vae makes {}": (unet.config.in_channels, vae.config.latent_channels),
        "unet attends to text of width {}, text_encoder makes {}": (
            unet.config.cross_attention_dim,
            width,
        ),
    }
    for text, (one, other) in pairs.items():
        if one != other:
            raise ModelError(
                text.format(one, other), where=str(folder), hint="only text-to-image checkpoints are supported"
            )
    _check_vocabulary(folder, "", tokenizer, text_encoder)
    config = unet.config
    more = [key for key in ("time_cond_proj_dim", *_CONDITIONS) if config.get(key) is not None]
    if config.addition_embed_type is not None and text_encoder_2 is None:
        more.append("addition_embed_type")
    if more:
        raise ModelError(
            f"unet takes conditions other than text and time ({more[0]} {config[more[0]]})",
            where=str(folder),
            hint="only text-to-image checkpoints are supported",
        )


def _check_vocabulary(folder: Path, suffix: str, tokenizer: Any, text_encoder: Any) -> None:
    words = text_encoder.config.vocab_size
    if len(tokenizer) > words:
        raise ModelError(
            f"tokenizer{suffix} has {len(tokenizer)} tokens, text_encoder{suffix} {words}", where=str(folder)
        )


def _check_double(folder: Path, unet: Any, tokenizer: Any, text_encoder: Any) -> None:
    """What SD XL has more: pooled text of the second encoder and six sizes, beside the time embedding."""
    _check_vocabulary(folder, "_2", tokenizer, text_encoder)
    config = unet.config
    if config.addition_embed_type != "text_time":
        raise ModelError(
            "has two text encoders, but its unet takes no pooled text and sizes",
            where=str(folder),
            hint="only text-to-image checkpoints of SD XL are supported",
        )
    made = 6 * config.addition_time_embed_dim + text_encoder.config.projection_dim
    if made != config.projection_class_embeddings_input_dim:
        raise ModelError(
            f"unet takes {config.projection_class_embeddings_input_dim} values of pooled text and sizes, "
            f"text_encoder_2 and six sizes make {made}",
            where=str(folder),
            hint="the refiner is not a text-to-image checkpoint",
        )
