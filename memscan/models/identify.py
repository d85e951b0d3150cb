"""This module says what a file or folder is if it is not a checkpoint, and what to do with it.

The message replaces "no such file".

Only names and the headers of safetensors files are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from memscan.errors import ModelError

_CONVERT = (
    "convert it to a diffusers folder: StableDiffusionPipeline (or StableDiffusionXLPipeline, ...)"
    ".from_single_file(FILE).save_pretrained(OUT)"
)
_GIVE_BASE = (
    "give a diffusers folder of the same kind as generator.base, which gives it configuration and tokenizer; or "
    "convert it: StableDiffusionPipeline (StableDiffusionXLPipeline, ...).from_single_file(FILE).save_pretrained(OUT)"
)
_LORA_MARKS = (
    ".lora_A.",
    ".lora_linear_layer.",
    ".lora_B.",
    ".lora_down.",
    ".lora_up.",
    ".lora.down.",
    ".lora.up.",
    "_lora.down.",
    "_lora.up.",
)
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Weights of the denoiser by a tensor that only this kind has, in the single files of the original code bases.
_SINGLE = {
    "conditioner.embedders.1.model.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "model.diffusion_model.double_blocks.": "Flux",
    "cond_stage_model.model.transformer.": "Stable Diffusion 2.x",
    "cond_stage_model.transformer.": "Stable Diffusion 1.x",
    "model.diffusion_model.": "Stable Diffusion",
}
# What else is handed over as one safetensors file, by a tensor that it has.
_ONE_PART = {
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
    "clip_l": "a textual inversion",
    "clip_g": "a textual inversion",
    "decoder.": "a VAE",
    "encoder.conv_in.": "a VAE",
    "text_model.": "a text encoder",
    "down_blocks.": "a diffusers UNet",
    "transformer_blocks.": "a diffusers transformer",
}
_WHOLE = "give the whole model as generator.path: a diffusers folder, or a single file that has its denoiser"


def tensor_names(file: Path) -> list[str]:
    """Return the names in a safetensors file's header; none if it is not such a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError):
        return []


def is_denoiser(names: Sequence[str]) -> bool:
    """Return whether tensors of these names are those of a single file of the original code that has a denoiser."""
    marks = ("model.diffusion_model.", "joint_blocks.", "double_blocks.")
    return not is_lora(names) and any(name.startswith(marks) for name in names)


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is the text that git has in the place of a large one."""
    try:
        with file.open("rb") as opened:
            return opened.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


def is_lora(names: Sequence[str]) -> bool:
    """Return whether tensors of these names are those of a LoRA or a similar adapter.

    It knows the formats of kohya, diffusers and PEFT.
    """
    return any(mark in name for name in names for mark in (*_LORA_MARKS, ".hada_w1", ".lokr_w1"))


def loras_in(folder: Path) -> list[Path]:
    """Return adapters in a checkpoint's folder or in one of its parts, whose weights are not applied by themselves."""
    found = [file for file in sorted(folder.glob("*.safetensors")) if is_lora(tensor_names(file))]
    for part in sorted(one for one in folder.iterdir() if one.is_dir()):
        found += [
            part / name for name in ("adapter_model.safetensors", "adapter_config.json") if (part / name).is_file()
        ][:1]
    return found


def not_a_folder(file: Path) -> ModelError:
    """Describe a file in the place of a model folder."""
    where = str(file)
    if file.suffix.lower() == ".gguf":
        return ModelError(
            "is a GGUF file, which is quantised", where=where, hint="give the original checkpoint's folder"
        )
    if file.suffix.lower() in _PICKLES:
        return ModelError(
            f"is a pickle ({file.suffix}), which may run code and is never loaded",
            where=where,
            hint=f"if you trust it, {_CONVERT}",
        )
    names = tensor_names(file)
    if is_lora(names):
        return _is_a_lora(where)
    kind = next((kind for mark, kind in _SINGLE.items() if any(name.startswith(mark) for name in names)), None)
    if kind is not None:
        return ModelError(f"is a single file of {kind}, not a model folder", where=where, hint=_GIVE_BASE)
    part = next((part for mark, part in _ONE_PART.items() if any(name.startswith(mark) for name in names)), None)
    if part is not None:
        return ModelError(f"is a file of {part} alone, which is no model by itself", where=where, hint=_WHOLE)
    if is_lfs_pointer(file):
        return ModelError("is a pointer of git-lfs and not the weights", where=where, hint="run git lfs pull")
    if file.suffix.lower() in (".safetensors", ".sft") and not names:
        return ModelError("is not a whole safetensors file", where=where, hint="copy or download it again")
    return ModelError("is a file, not a model folder", where=where, hint=_GIVE_BASE if names else None)


def not_a_checkpoint(folder: Path) -> ModelError:
    """Describe a folder without `model_index.json`."""
    where = str(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() or any(is_lora(tensor_names(file)) for file in files):
        return _is_a_lora(where)
    trained = [part for part in ("unet", "unet_ema", "transformer", "transformer_ema") if (folder / part).is_dir()]
    if trained:
        return ModelError(
            f"is a training checkpoint: it has {trained[0]}/ and no model_index.json",
            where=where,
            hint="give the model that was trained as generator.base",
        )
    if (folder / "config.json").is_file():
        what = f"is one part of a checkpoint ({_class_in(folder)})"
        return ModelError(what, where=where, hint="give the whole folder, or this one together with generator.base")
    if len(files) == 1:
        what = f"holds a single file ({files[0].name}), and is not a model folder"
        return ModelError(what, where=where, hint=f"give the file itself as generator.path, and {_GIVE_BASE}")
    if not any(folder.iterdir()):
        return ModelError("is an empty folder", where=where, hint="give a diffusers folder")
    return ModelError("has no model_index.json", where=where, hint="give a diffusers folder")


def _class_in(folder: Path) -> str:
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = None
    named = [facts.get("_class_name"), *(facts.get("architectures") or [])] if isinstance(facts, dict) else []
    return str(next((one for one in named if one), "it has a config.json"))


def _is_a_lora(where: str) -> ModelError:
    return ModelError(
        "is a LoRA, which is no model by itself",
        where=where,
        hint="give its base as generator.path, and the LoRA as generator.loras: [{path: ...}]",
    )
