"""This module finds model folders, and checks whether they are complete.

A folder is taken as it is, one on s3:// is copied to this machine first (`local_copy.py`); a hub id is downloaded only
when the configuration pins its revision. Weights are safetensors, never pickle. Files are checked before the libraries
read them, because a library's own words for a truncated file or a missing tensor do not say which file, and some
replace missing weights by random ones.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscan.errors import ModelError
from memscan.io import storage
from memscan.models.identify import is_lfs_pointer, not_a_checkpoint, not_a_folder
from memscan.models.local_copy import stage

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
CHECKPOINT_PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
# Pipelines around the weights of Stable Diffusion 1.x, 2.x and XL; others may sample the same parts by another rule.
OWN_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionPipelineSafe",
    "FlaxStableDiffusionPipeline",
    "FlaxStableDiffusionXLPipeline",
    "OnnxStableDiffusionPipeline",
)
DOUBLE_PARTS = ("text_encoder_2", "tokenizer_2")
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")


def resolve_folder(path: str, revision: str | None, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """Return a local folder for a path or hub id.

    It downloads (or finds in the hub's cache) only if `revision` is given.

    Raises:
        ModelError: there is no such folder, the revision is a name that can move, or the download failed.
    """
    local = Path(path)
    if local.is_dir():
        return snapshot_in(local)
    if local.exists():
        raise not_a_folder(local)
    if storage.is_remote(path):
        return stage(path)
    if revision is None or not _HUB_ID.fullmatch(path):
        raise ModelError("no such model folder", where=path, hint="give a folder, or a hub id together with `revision`")
    check_commit(path, revision)
    return _download(path, revision, patterns)


def snapshot_in(folder: Path) -> Path:
    """Return the only snapshot of a repository's folder in the hub's cache (models--ORG--NAME).

    Any other folder is returned itself.

    Raises:
        ModelError: it has several snapshots, or none.
    """
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder
    found = sorted(one for one in snapshots.iterdir() if one.is_dir())
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise ModelError(
            f"is a repository in the hub's cache with {len(found)} snapshots ({names})",
            where=str(folder),
            hint="give the folder of one: snapshots/COMMIT",
        )
    return found[0]


def check_commit(hub_id: str, revision: str) -> None:
    """Refuse a branch or tag: it can be another model tomorrow, and a run's models are named by their revision.

    Raises:
        ModelError: the revision is not a commit's 40 hex digits.
    """
    if not _COMMIT.fullmatch(revision):
        raise ModelError(
            f"revision {revision!r} can move",
            where=hub_id,
            hint="pin the commit (40 hex digits), which the hub shows under `History`",
        )


def _download(hub_id: str, revision: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises its own, httpx's and OSError kinds
        raise ModelError(
            f"cannot fetch revision {revision} ({type(error).__name__}: {first_line(error)})",
            where=hub_id,
            hint="check the id, the revision and the network, or put the folder on disk and give its path",
        ) from error


def folder_name(path: str) -> str:
    """Return a short name for a model folder or hub id, for a specification."""
    return re.sub(r"[^\w.-]+", "_", Path(path).name) or "model"


def read_config(file: Path) -> dict[str, Any]:
    """Return a JSON object of a model folder.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"has no {file.name}", where=str(file.parent)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read as JSON ({first_line(error)})", where=str(file)) from error
    if not isinstance(data, dict):
        raise ModelError("is not a JSON object", where=str(file))
    return data


def listed_class(index: Mapping[str, Any], part: str) -> Any:
    """Return the class that a `model_index.json` lists for a part.

    It is None if there is none, or if it is not listed as diffusers writes it.
    """
    value = index.get(part)
    return value[1] if isinstance(value, list) and len(value) == 2 else None


def is_double(index: Mapping[str, Any]) -> bool:
    """Return whether a `model_index.json` is that of SD XL, with two text encoders."""
    return index.get("text_encoder_2") not in (None, [None, None])


def is_own(index: Mapping[str, Any], unet: Mapping[str, Any]) -> bool:
    """Return whether memscan's own loop knows a checkpoint, by its `model_index.json` and its denoiser's configuration.

    It knows what Stable Diffusion 1.x, 2.x and XL consist of; a denoiser that takes the guidance as an input, as that
    of a latent consistency model (`time_cond_proj_dim`), is none of these. Whether a checkpoint is whole is another
    question.
    """
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    listed = {part: listed_class(index, part) for part in kinds}
    # A part that is not even listed is missing from a Stable Diffusion checkpoint, and nothing unusual in another one.
    lacking = str(index.get("_class_name")).startswith("StableDiffusion")
    same = all(lacking if found is None else found == kinds[part] for part, found in listed.items())
    name = index.get("_class_name")
    sampled = name is None or (isinstance(name, str) and name in OWN_PIPELINES)
    return sampled and same and not _extra_parts(index) and unet.get("time_cond_proj_dim") is None


def _extra_parts(index: Mapping[str, Any]) -> list[str]:
    """Components that a Stable Diffusion checkpoint has not."""
    others = ("text_encoder_", "transformer", "prior", "vqvae", "movq", "controlnet")
    known = (*CHECKPOINT_PARTS, *DOUBLE_PARTS)
    return sorted(
        key for key in index if key.startswith(others) and key not in known and index[key] not in (None, [None, None])
    )


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Check that a Stable Diffusion folder has its parts and whole weights, reading headers only; imports no torch.

    Returns:
        What `model_index.json` says.

    Raises:
        ModelError: a part is missing or broken, or it is another kind of pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise not_a_checkpoint(folder)
    index = read_config(folder / "model_index.json")
    parts = (*CHECKPOINT_PARTS, *DOUBLE_PARTS) if is_double(index) else CHECKPOINT_PARTS
    for part in parts[1:]:
        if not (folder / part).is_dir():
            raise ModelError(f"has no {part}/", where=str(folder), hint="the checkpoint is incomplete")
    if extra := _extra_parts(index):
        kind = index.get("_class_name", "another pipeline")
        raise ModelError(
            f"is a {kind} (it has {extra[0]})", where=str(folder), hint="Stable Diffusion 1.x, 2.x and XL are supported"
        )
    for part in parts:
        if part.startswith("text_encoder"):
            check_weights(folder / part, "model")
    check_weights(folder / "unet", "diffusion_pytorch_model")
    check_weights(folder / "vae", "diffusion_pytorch_model")
    return index


@dataclass(frozen=True)
class Weights:
    """These are the files of one set of weights in a part's folder, and its variant as diffusers calls it.

    The variant is None for the usual weights.
    """

    files: tuple[Path, ...]
    variant: str | None = None


def find_weights(folder: Path, stem: str) -> Weights:
    """Return the safetensors files of a part: the usual ones, or those of one variant (fp16 before bf16).

    Raises:
        ModelError: there are none, or several variants and no reason to prefer one; names what is there instead.
    """
    for variant in (None, *_variants(folder, stem)):
        middle = f".{variant}" if variant else ""
        index = folder / f"{stem}.safetensors.index{middle}.json"
        single = folder / f"{stem}{middle}.safetensors"
        if single.is_file() and index.is_file():
            raise ModelError(
                f"has its weights twice, as {single.name} and in the shards of {index.name}",
                where=str(folder),
                hint="libraries differ in which they load: keep one of them",
            )
        if single.is_file():
            return Weights((single,), variant)
        if index.is_file():
            return Weights(tuple(folder / name for name in sorted(_shards(index))), variant)
    raise ModelError(f"has no weights file {stem}.safetensors", where=str(folder), hint=_other_formats(folder, stem))


def _variants(folder: Path, stem: str) -> list[str]:
    pattern = re.compile(rf"{re.escape(stem)}\.(?:safetensors\.index\.)?(\w+)\.(?:safetensors|json)")
    found = {match[1] for file in folder.glob(f"{stem}*") if (match := pattern.fullmatch(file.name))}
    found -= {"index", "non_ema", "safetensors"}  # a training's raw weights are not what its author publishes
    known = [name for name in ("fp16", "bf16") if name in found]
    others = sorted(found - set(known))
    if not known and len(others) > 1:
        raise ModelError(
            f"has weights in the variants {', '.join(others)} only", where=str(folder), hint="keep one of them"
        )
    return [*known, *others]


def _other_formats(folder: Path, stem: str) -> str | None:
    """Return what to do where the weights are of another format, by what is there."""
    if next(folder.glob("*.gguf"), None):
        return "GGUF weights are quantised and not loaded: give the original checkpoint"
    if (folder / "adapter_model.safetensors").is_file():
        return "it holds a PEFT adapter: name it under generator.loras, on its base"
    if _has_pickles(folder):
        return (
            "only safetensors weights are loaded, no pickles; if you trust them, convert them: load the pipeline "
            "with diffusers and save_pretrained(OUT)"
        )
    return "the checkpoint is incomplete: copy or download it again"


def check_weights(folder: Path, stem: str) -> Weights:
    """Check that a set of weights is there and whole (header and length agree), and is a plain network's.

    Raises:
        ModelError: names the file and the folder: missing, cut off, a git-lfs pointer, names with a wrapper's prefix,
            quantised by a package that is not installed.
    """
    refuse_foreign_code(folder)
    for listing in sorted(folder.glob("*.index.json")):
        _shards(listing)  # also of those that our own loading would not look at
    _check_quantised(folder)
    weights = find_weights(folder, stem)
    for file in weights.files:
        if not file.is_file():
            raise ModelError(f"has no weights file {file.name}", where=str(folder), hint=_other_formats(folder, stem))
        _check_names(_check_safetensors(file), file)
    return weights


# What trainers wrap around a network, as it shows in the names of its weights.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "base_model.model.": "PEFT",
}


def _check_names(names: Sequence[str], file: Path) -> None:
    for prefix, wrapper in _WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            raise ModelError(
                f"its weights were saved inside {wrapper}: their names begin with {prefix}",
                where=str(file),
                hint="unwrap the network before saving it, or remove the prefix from the names",
            )
    wrapped = [name for name in names if ".lora_A." in name or ".base_layer." in name]
    if wrapped:
        raise ModelError(
            f"its weights are those of a network with LoRA layers inside ({wrapped[0]})",
            where=str(file),
            hint="merge them (merge_and_unload) and save again, or give the base and generator.loras",
        )


def _check_quantised(folder: Path) -> None:
    config = folder / "config.json"
    quantised = read_config(config).get("quantization_config") if config.is_file() else None
    if not isinstance(quantised, dict):
        return
    method = str(quantised.get("quant_method") or "").lower()
    package = {"gguf": "gguf", "quanto": "optimum.quanto", "modelopt": "modelopt"}.get(method)
    package = package or ("torchao" if "torchao" in method else "bitsandbytes")
    if importlib.util.find_spec(package.split(".")[0]) is None:
        raise ModelError(
            f"is quantised by {method or package}, and the package {package} is not installed",
            where=str(folder),
            hint=f"pip install {package}, or give the checkpoint before its quantisation",
        )


def _shards(index: Path) -> set[str]:
    """Return file names in an index of shards.

    Raises:
        ModelError: one is no plain name of a safetensors file. What begins with a dot, or ends otherwise, is loaded by
            libraries all the same, by torch.load even, and is no part of the folder's hash.
    """
    listed = read_config(index).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) and all(map(_is_text, listed.values())) else set()
    wrong = sorted(name for name in names if "/" in name or not storage.is_inner(name) or not _is_hashed(name))
    if not names or wrong:
        first = f" (first {wrong[0][:80]!r})" if wrong else ""
        raise ModelError(
            f"its weight_map does not name safetensors files of the folder{first}",
            where=str(index),
            hint="weights are loaded from plain *.safetensors files beside it only, for these are hashed",
        )
    return names


def _is_hashed(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".")


_KERNELS = ("attn_implementation", "attn_implementation_internal", "experts_implementation")


def refuse_foreign_code(folder: Path) -> None:
    """Refuse a model folder whose config.json has libraries fetch code: attention or expert kernels from the hub.

    Code in the folder (`auto_map`) is left alone by `trust_remote_code=False`; these are not.

    Raises:
        ModelError: names the key.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    waiting: list[Any] = [read_config(file)]
    while waiting:
        value = waiting.pop()
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(one, dict | list):
                waiting.append(one)
            elif isinstance(one, str) and str(key).endswith(_KERNELS) and ("/" in one or ":" in one):
                raise ModelError(f"its {key} {one[:80]!r} names code on a hub", where=str(file), hint="remove the key")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _has_pickles(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth"))


def _check_safetensors(file: Path) -> list[str]:
    """Names of the tensors in a whole file. Raises ModelError for another one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(file):
            raise ModelError(
                "is a pointer of git-lfs and not the weights",
                where=str(file),
                hint="run git lfs pull in its folder",
            ) from error
        raise ModelError(
            f"not a whole safetensors file ({first_line(error)})", where=str(file), hint="copy or download it again"
        ) from error


def require_loaded(info: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model some of whose weights were absent or of another shape: they would have been left random.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returned beside the model.

    Raises:
        ModelError: names the first missing weight.
    """
    wrong = [*info.get("missing_keys", ()), *(key[0] for key in info.get("mismatched_keys", ()))]
    if wrong:
        raise ModelError(
            f"weights do not fit config.json: {len(wrong)} missing or of another shape, first {sorted(wrong)[0]}",
            where=str(folder),
        )


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's text, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last non-empty line of an exception's text.

    TorchScript puts its own traceback before the reason.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
