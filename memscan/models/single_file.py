"""This module makes a diffusers folder in the cache of a single file of the original code (A1111, civitai, ComfyUI).

Each part is read by diffusers' own single-file loaders, out of the safetensors file and the configuration that
`generator.base` has for it; nothing is fetched. What a file never holds (tokenizers, scheduler), and parts that this
file lacks, are the base's. The result is a folder like any other, so that every reader of checkpoints, and the hash,
sees what is sampled. If no part uses a tensor of the file, the file is refused, because the result would be another
model.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memscan.errors import ModelError
from memscan.io import storage
from memscan.io.cache import cache_folder, check_room, one_at_a_time
from memscan.models.folders import check_weights, first_line, read_config
from memscan.models.identify import is_denoiser, not_a_folder, tensor_names
from memscan.models.specification import hash_file

SUFFIXES = (".safetensors", ".sft")
_LATENT = ("first_stage_model.", "vae.")
_DENOISER = "model.diffusion_model."
# Where a part's tensors are, by the base's name of it and whether it is a T5.
_ENCODERS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
_T5 = ("text_encoders.t5xxl.",)
# Constants of a noise schedule, counters and losses of a training: no weights of a network that samples.
_INERT = re.compile(
    r"betas|(sqrt_)?(recip(m1)?_|one_minus_|log_one_minus_)*alphas_cumprod(_prev)?|sqrt_\w*alphas_cumprod|posterior_\w+"
    r"|log_\w+|logvar|lvlb_weights|denoiser\.\w+|global_step|model_ema\.(decay|num_updates)|(first_stage_model|vae)\.loss\..*"
    r"|v_pred|ztsnr|edm_\w+(\.\w+)*|cond_stage_model\.logit_scale|text_encoders\.\w+\.logit_scale"
)
# What stands beside the weights in a quantised file: ComfyUI's scaled fp8, bitsandbytes, GPTQ and SVDQuant.
_QUANTISED = re.compile(
    r"(.*\.)?scaled_fp8|.*\.(scale_weight|scale_input|weight_scale|input_scale|absmax|quant_map|quant_state\..+|qweight"
    r"|qzeros|wscales)"
)
_UNUSED = re.compile(rf"{_INERT.pattern}|.*\.position_ids|.*\.logit_scale|.*\.encoder\.embed_tokens\.weight")


def is_single_file(path: str) -> bool:
    """Return whether a path is that of a file, local or on s3://, that may hold a checkpoint as safetensors."""
    return path.lower().endswith(SUFFIXES) and (storage.is_remote(path) or Path(path).is_file())


def opened(file: Path, base: Path) -> Path:
    """Return the diffusers folder of a single file, made once for its content and the base's configuration.

    Args:
        base: a diffusers folder of the same kind; parts that the file has need no weights in it.

    Raises:
        ModelError: the file is not one of a checkpoint, or does not fit the base; names the part and why.
        MemscanError: the cache cannot be written.
    """
    names = tensor_names(file)
    if not is_denoiser(names):
        raise not_a_folder(file)
    if quantised := next((name for name in sorted(names) if _QUANTISED.fullmatch(name)), None):
        raise ModelError(
            f"is quantised (it holds {quantised}), and single files are read unquantised only",
            where=str(file),
            hint="give the file in float32, float16, bfloat16 or plain fp8",
        )
    parts = _parts(file, base, names)
    key = hashlib.sha256(f"{hash_file(file)}\0{_hash_base(base)}\0{base}\0{_diffusers_version()}".encode()).hexdigest()
    target = cache_folder() / "single" / key[:16] / re.sub(r"[^\w.-]+", "_", file.stem)
    if not target.is_dir():
        with one_at_a_time(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                check_room(file.stat().st_size, str(file))
                _write(file, base, parts, target)
    return target


def _hash_base(base: Path) -> str:
    """Hash the configurations that the parts are built by; the links to the base's other files follow what it holds."""
    known = [base / "model_index.json", *sorted(base.glob("*/config.json"))]
    return hashlib.sha256("\0".join(f"{one.parent.name}{hash_file(one)}" for one in known).encode()).hexdigest()


def _diffusers_version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def _networks(base: Path) -> Iterator[tuple[str, str, str]]:
    """Give (part, library, class) of the networks that a base lists."""
    from memscan.models.adapters import components

    for part, (library, kind) in components(read_config(base / "model_index.json")).items():
        if (base / part / "config.json").is_file():
            yield part, library, kind


def _parts(file: Path, base: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Find, by part of the base, the prefixes of its tensors in the file; parts that the file lacks are left out.

    Raises:
        ModelError: a part is in neither, or tensors of the file belong to none.
    """
    found: dict[str, tuple[str, ...]] = {}
    for part, library, kind in _networks(base):
        bare = not any(name.startswith(_DENOISER) for name in names)
        prefixes = {
            "vae": _LATENT,
            "unet": ("" if bare else _DENOISER,),
            "transformer": ("" if bare else _DENOISER,),
        }.get(part, _T5 if kind.startswith("T5") else _ENCODERS.get(part, ()))
        if part in ("unet", "transformer") or any(name.startswith(prefix) for name in names for prefix in prefixes):
            found[part] = prefixes
        else:
            try:
                check_weights(base / part, "model" if library == "transformers" else "diffusion_pytorch_model")
            except ModelError as error:
                raise ModelError(f"has no {part}, and neither has generator.base ({error})", where=str(file)) from error
    known = tuple(prefix for prefixes in found.values() for prefix in prefixes)
    if any(name.startswith("model_ema.") and not _INERT.fullmatch(name) for name in names):
        raise ModelError(
            "holds two denoisers, the trained one and its average (model_ema.)",
            where=str(file),
            hint="prune it to the one that you mean, or convert it: from_single_file(FILE, extract_ema=True or False)",
        )
    strange = [name for name in names if not _INERT.fullmatch(name) and not name.startswith(known)]
    if strange:
        whole = read_config(base / "model_index.json").get("_class_name")
        raise ModelError(
            f"holds {len(strange)} tensors that are no part of a {whole}, which generator.base is; first {strange[0]}",
            where=str(file),
            hint="give a base of the file's own kind",
        )
    _check_marks(file, base, names)
    return found


def _check_marks(file: Path, base: Path, names: Sequence[str]) -> None:
    """Refuse a base whose scheduler contradicts what the file says of its own prediction type."""
    from safetensors import safe_open

    schedule = read_config(base / "scheduler" / "scheduler_config.json")
    with safe_open(str(file), framework="np") as weights:
        said = (weights.metadata() or {}).get("modelspec.prediction_type", "").lower()
    wanted = {
        "v": "v_prediction",
        "v_prediction": "v_prediction",
        "v-prediction": "v_prediction",
        "epsilon": "epsilon",
    }.get("v" if "v_pred" in names else said)
    has = schedule.get("prediction_type", "epsilon")
    edm = any(name.startswith("edm_") for name in names)
    if wanted is not None and has in ("epsilon", "v_prediction") and has != wanted:
        what, key, value = f"says that it predicts {wanted}", "prediction_type", wanted
    elif "ztsnr" in names and not schedule.get("rescale_betas_zero_snr"):
        what, key, value = "says that it has zero terminal SNR (ztsnr)", "rescale_betas_zero_snr", "true"
    elif edm and not str(schedule.get("_class_name")).startswith("EDM"):
        what, key, value = "says that it is an EDM model (edm_)", "_class_name", "EDMEulerScheduler or its like"
    else:
        return
    raise ModelError(
        f"{what}, and the scheduler of generator.base has {key} {schedule.get(key, 'not set')}",
        where=str(file),
        hint=f"set {key} to {value} in the base's scheduler/scheduler_config.json",
    )


def _write(file: Path, base: Path, parts: Mapping[str, tuple[str, ...]], target: Path) -> None:
    """Write the folder, all at once: converted parts, and links to the base for the rest."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"not a whole safetensors file ({first_line(error)})", where=str(file)) from error
    try:
        temporary.mkdir(parents=True)
        for entry in sorted(base.iterdir()):
            if entry.name not in parts and not entry.name.startswith("."):
                (temporary / entry.name).symlink_to(entry)
        for part, library, kind in _networks(base):
            if part not in parts:
                continue
            own = {name: one for name, one in tensors.items() if name.startswith(parts[part])}
            state = _converted(file, base, part, getattr(importlib.import_module(library), kind), own)
            (temporary / part).mkdir()
            shutil.copyfile(base / part / "config.json", temporary / part / "config.json")
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            save_file(state, temporary / part / f"{stem}.safetensors", metadata={"format": "pt"})
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _converted(file: Path, base: Path, part: str, kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return a part's weights as diffusers names them, out of the file's tensors.

    Raises:
        ModelError: they are not those of the base's configuration, to the last one.
    """
    from memscan.models.quiet import quiet_libraries

    dtype = next((one.dtype for one in own.values() if one.is_floating_point() and one.ndim > 1), None)
    hint = f"give a base of the file's own kind and size; {part}/config.json of generator.base belongs to another one"
    try:
        with quiet_libraries():
            network = _loader(kind)(
                dict(own), config=str(base), subfolder=part, local_files_only=True, torch_dtype=dtype
            )
    except Exception as error:  # converters raise every kind, down to KeyError, where a tensor is missing
        raise ModelError(
            f"its {part} cannot be read as a {kind.__name__} ({type(error).__name__}: {first_line(error)})",
            where=str(file),
            hint=hint,
        ) from error
    state = {name: one.contiguous() for name, one in network.state_dict().items()}
    if "shared.weight" in state:
        state.pop("encoder.embed_tokens.weight", None)  # a T5 has its words under two names
    missing = sorted(name for name, one in state.items() if one.is_meta)
    if missing:
        raise ModelError(f"its {part} lacks {len(missing)} weights, first {missing[0]}", where=str(file), hint=hint)
    # A converter passes over what it has no place for: then another model than the file's would be sampled. OpenCLIP's
    # last layer and projection have none in Stable Diffusion 2, and Stable Diffusion 3's first CLIP gets a projection.
    if not any(".model." in name for name in own if name.startswith(("cond_stage_model.", "conditioner."))):
        held = sum(one.numel() for name, one in own.items() if not _UNUSED.fullmatch(name))
        used = sum(one.numel() for name, one in state.items() if name != "text_projection.weight")
        projected = sum(one.numel() for name, one in own.items() if name.endswith("text_projection.weight"))
        if held - projected != used:
            raise ModelError(
                f"its {part} has {held:,} values, and {kind.__name__} {used:,}", where=str(file), hint=hint
            )
    return state


def _loader(kind: Any) -> Callable[..., Any]:
    from diffusers.loaders import FromOriginalModelMixin
    from diffusers.loaders.single_file_utils import (
        create_diffusers_clip_model_from_ldm,
        create_diffusers_t5_model_from_checkpoint,
    )

    if issubclass(kind, FromOriginalModelMixin):
        return lambda tensors, **options: kind.from_single_file(tensors, **options)
    make = create_diffusers_t5_model_from_checkpoint if "T5" in kind.__name__ else create_diffusers_clip_model_from_ldm
    return lambda tensors, **options: make(kind, tensors, **options)
