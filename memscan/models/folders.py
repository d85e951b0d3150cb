"""Model folders: where they come from, and whether they are whole.

A folder is taken as it is, one on s3:// is copied to this machine first (`staging.py`); a hub id is downloaded only
when the configuration pins its revision. Weights are safetensors, never pickle. Files are checked before the libraries
read them, because a library's own words for a truncated file or a missing tensor do not say which file, and some
replace missing weights by random ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memscan.errors import ModelError
from memscan.io import storage
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
    """A local folder for a path or hub id; downloads (or finds in the hub's cache) only when `revision` is given.

    Raises:
        ModelError: there is no such folder, the revision is a name that can move, or the download failed.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if local.exists():
        raise ModelError("is a file, not a model folder", where=path)
    if storage.is_remote(path):
        return stage(path)
    if revision is None or not _HUB_ID.fullmatch(path):
        raise ModelError("no such model folder", where=path, hint="give a folder, or a hub id together with `revision`")
    check_commit(path, revision)
    return _download(path, revision, patterns)


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
    """A short name for a model folder or hub id, fit for a specification."""
    return re.sub(r"[^\w.-]+", "_", Path(path).name) or "model"


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

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
    """The class that a `model_index.json` lists for a part; None where it lists none, or not as diffusers writes it."""
    value = index.get(part)
    return value[1] if isinstance(value, list) and len(value) == 2 else None


def is_double(index: Mapping[str, Any]) -> bool:
    """Whether a `model_index.json` is that of SD XL: two text encoders."""
    return index.get("text_encoder_2") not in (None, [None, None])


def is_own(index: Mapping[str, Any], unet: Mapping[str, Any]) -> bool:
    """Whether our own sampling loop knows a checkpoint, by its `model_index.json` and its denoiser's configuration.

    It knows what Stable Diffusion 1.x, 2.x and XL consist of; a denoiser that is told the guidance, as that of a latent
    consistency model (`time_cond_proj_dim`), is none of these. Whether a checkpoint is whole is another question.
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


def check_weights(folder: Path, stem: str) -> None:
    """Check that `stem.safetensors`, or every shard of its index, is there and whole (header and length agree).

    Raises:
        ModelError: names the file and the folder.
    """
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if not (folder / f"{stem}.safetensors").is_file() and index.is_file():
        names = _shards(index)
    for name in sorted(names):
        if not (folder / name).is_file():
            hint = "only safetensors weights are loaded" if _has_pickles(folder) else None
            raise ModelError(f"has no weights file {name}", where=str(folder), hint=hint)
        _check_safetensors(folder / name)


def _shards(index: Path) -> set[str]:
    """File names in an index of safetensors shards. Raises ModelError for one that is no plain name."""
    listed = read_config(index).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) and all(map(_is_text, listed.values())) else set()
    if not names or any("/" in name or not storage.is_inner(name) for name in names):
        raise ModelError("its weight_map does not name files of the folder", where=str(index))
    return names


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _has_pickles(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth"))


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
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
    """The first non-empty line of an exception's text, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """The last non-empty line of an exception's text: TorchScript puts its own traceback before the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
