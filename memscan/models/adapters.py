"""This module chooses the adapter of a checkpoint: memscan's own loop, or the stock pipeline of diffusers.

It reads only JSON, and no torch.

Our loop (`generator.Generator`) knows Stable Diffusion 1.x, 2.x and XL. Every other text-to-image pipeline is called as
it is (`stock.StockGenerator`): slower and without a screen, but its generations are judged like all others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memscan.config import GeneratorConfig
from memscan.errors import ConfigError, ModelError
from memscan.io import storage
from memscan.models.composition import resolve_checkpoint
from memscan.models.folders import (
    CHECKPOINT_PARTS,
    DOUBLE_PARTS,
    check_weights,
    is_double,
    is_own,
    listed_class,
    read_config,
)
from memscan.models.identify import loras_in, not_a_checkpoint
from memscan.models.lora_files import lora_file
from memscan.models.noise_schedules import EDM, chosen, is_variance_preserving, name_in, unsuited
from memscan.models.single_file import is_single_file

NOISE_NORMS = ("noise_norm", "noise_norm_first")
# Never loaded: what they would hide is what a census looks for, and marks in the pixels are not the model's.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "watermarker")
# What is read before anything heavy is fetched.
JSON_PATTERNS = ("model_index.json", "*/config.json", "scheduler/scheduler_config.json")
_NEEDS_IMAGE = re.compile(r"Img2Img|ImageToImage|Image2Image|Inpaint|Control|Fill|Upscale|Depth2Img|Pix2Pix|Redux|Edit")
_NO_IMAGE = re.compile(r"Video|Audio|Upsampl|Prior(?:Pipeline|Redux)|EmbPipeline")


@dataclass(frozen=True)
class Adapter:
    """This says how a checkpoint is sampled.

    Args:
        kind: "own" (our loop) or "stock" (the pipeline as diffusers ships it).
        pipeline: class name in `model_index.json`.
        scheduler: class name of the scheduler that samples.
        parts: entries of the folder that decide the images, and so are hashed.
        distilled: guidance is built in: there is no prediction without caption.
        predicts: "noise" (also as v) or "velocity" (flow matching).
        warnings: settings that do not suit the model, a sentence each.
    """

    kind: Literal["own", "stock"]
    pipeline: str
    scheduler: str
    parts: tuple[str, ...]
    distilled: bool
    predicts: Literal["noise", "velocity"]
    warnings: tuple[str, ...] = ()

    @property
    def sampled_by(self) -> str:
        """Return in words what samples, for run.json and the report."""
        if self.kind == "own":
            return f"memscan's sampling loop with {self.scheduler}"
        return f"the stock {self.pipeline} of diffusers with {self.scheduler}"

    def not_applicable(self, guidance: float) -> dict[str, str]:
        """Return the signals of a scan that this model cannot have, with the reason.

        The answer comes from the configuration alone.
        """
        if self.distilled:
            why = "guidance is built into the model: it makes no prediction without the caption"
        elif guidance <= 1:
            why = "guidance is off: there is no prediction without the caption"
        elif self.predicts == "velocity":
            why = "the model predicts a velocity and not noise; with guidance it has velocity_norm"
        else:
            return {}
        return dict.fromkeys(NOISE_NORMS, why)

    def to_json(self, guidance: float) -> dict[str, Any]:
        """Return what run.json and census.json record about it."""
        return {
            "adapter": self.kind,
            "pipeline": self.pipeline,
            "scheduler": self.scheduler,
            "sampled_by": self.sampled_by,
            "not_applicable": self.not_applicable(guidance),
            "warnings": list(self.warnings),
        }


def adapter_of(config: GeneratorConfig) -> Adapter:
    """Return the adapter of a configured checkpoint.

    For a hub id only the JSON files are fetched.

    Raises:
        ModelError: no such folder, damaged JSON, remote code, or a pipeline that makes no image of a text alone.
        ConfigError: a setting that only our own loop has, for a checkpoint that it does not sample.
    """
    return adapter_in(resolve_checkpoint(config, JSON_PATTERNS), config)


def adapter_in(folder: Path, config: GeneratorConfig) -> Adapter:
    """Return what `adapter_of` returns, for a local folder."""
    if not (folder / "model_index.json").is_file():
        raise not_a_checkpoint(folder)
    index = read_config(folder / "model_index.json")
    unet = _config(folder / "unet")
    _refuse_adapters(folder, config)
    schedule = _config(folder / "scheduler", "scheduler_config.json")
    _refuse_code(folder, index)
    known = is_own(index, unet)
    if known:
        _refuse_schedules(folder, name_in(schedule))
    own = config.adapter == "auto" and known and name_in(schedule) not in EDM
    name = index.get("_class_name")
    pipeline = name if isinstance(name, str) else "pipeline"
    if own:
        scheduler = chosen(config.scheduler, schedule)
        parts: tuple[str, ...] = (*CHECKPOINT_PARTS, *(DOUBLE_PARTS if is_double(index) else ()))
    else:
        _refuse_others(folder, index)
        _refuse_settings(config, pipeline)
        named = str(schedule.get("_class_name") or listed_class(index, "scheduler") or "its own scheduler")
        scheduler = named if config.scheduler == "auto" else config.scheduler
        parts = ("model_index.json", *components(index))
    transformer = _config(folder / "transformer")
    distilled = unet.get("time_cond_proj_dim") is not None or bool(transformer.get("guidance_embeds"))
    flow = scheduler.startswith("FlowMatch") or schedule.get("prediction_type") == "flow_prediction"
    warnings = unsuited(schedule, config.steps, config.guidance)
    if pipeline.startswith("Flux") and transformer.get("guidance_embeds") is False and config.guidance > 1:
        warnings.append(
            f"generator.guidance {config.guidance:g} does not suit this checkpoint: a Flux without guidance "
            "embedding is distilled to few steps (schnell), and is sampled without guidance"
        )
    if is_single_file(config.path) and (lent := [part for part in components(index) if _is_lent(folder / part)]):
        warnings.append(
            f"{', '.join(lent)} come from generator.base, because the single file {Path(config.path).name} has none"
        )
    kind: Literal["own", "stock"] = "own" if own else "stock"
    return Adapter(
        kind, pipeline, scheduler, parts, distilled, "velocity" if flow else "noise", warnings=tuple(warnings)
    )


def _is_lent(part: Path) -> bool:
    """Return whether a network of a single file's folder is the base's: a link."""
    return part.is_symlink() and (part / "config.json").is_file()


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the entries of a `model_index.json` that are loaded: folder -> (library, class).

    Raises:
        ModelError: a part whose name is no plain folder name.
    """
    found = {}
    for name, value in index.items():
        listed = isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
        if listed and not name.startswith("_") and name not in UNUSED_PARTS:
            if "/" in name or not storage.is_inner(name):
                raise ModelError(f"model_index.json names a part {name!r} outside the folder")
            found[name] = (value[0], value[1])
    return found


def check_components(folder: Path) -> None:
    """Check that every component's folder is there and its weights whole, reading headers only.

    Raises:
        ModelError: names the component, the file and the folder.
    """
    for part, (library, _) in components(read_config(folder / "model_index.json")).items():
        if not (folder / part).is_dir():
            raise ModelError(f"has no {part}/", where=str(folder), hint="the checkpoint is incomplete")
        if (folder / part / "config.json").is_file():  # models have one; schedulers and tokenizers have others
            check_weights(folder / part, "model" if library == "transformers" else "diffusion_pytorch_model")


def _refuse_adapters(folder: Path, config: GeneratorConfig) -> None:
    """Refuse adapters beside a base that nobody applies, or that what else is installed decides about."""
    named = {lora_file(lora.path).resolve() for lora in config.loras}
    for file in loras_in(folder):
        if file.parent != folder:
            raise ModelError(
                f"has a PEFT adapter in {file.parent.name}/, which would be applied or not by what is installed",
                where=str(folder),
                hint="move it out of the folder, and name it under generator.loras to have it applied",
            )
        if file.resolve() not in named:
            raise ModelError(
                f"has a LoRA beside its weights ({file.name}), which is not applied",
                where=str(folder),
                hint=f"name it under generator.loras ([{{path: {file}}}]), or move it out of the folder",
            )


def _refuse_schedules(folder: Path, name: str | None) -> None:
    """Refuse a Stable Diffusion checkpoint whose scheduler nobody samples it by as it was trained."""
    if not is_variance_preserving(name) and name not in EDM:
        raise ModelError(
            f"has the scheduler {name}, whose noise schedule is not that of a Stable Diffusion checkpoint",
            where=str(folder),
            hint="put the scheduler with which it was trained into scheduler/scheduler_config.json",
        )


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that has code of its own, whoever would sample it: our loop would sample something else."""
    name, where, hint = index.get("_class_name"), str(folder), "remote code is not run"
    if isinstance(name, list):
        raise ModelError(
            f"is a pipeline with its own code ({'.'.join(map(str, name))})",
            where=where,
            hint="pipelines with their own code are not loaded",
        )
    if (folder / "pipeline.py").is_file():  # diffusers' name for it; other scripts of a repository are not loaded
        raise ModelError("is a pipeline with its own code (pipeline.py)", where=where, hint=hint)
    for part, (library, kind) in components(index).items():
        if next((folder / part).glob("*.py"), None) or "." in library or not kind.isidentifier():
            raise ModelError(f"{part} has code of its own ({library}.{kind})", where=where, hint=hint)


def _refuse_others(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse what is no text-to-image pipeline by its name."""
    name, where = index.get("_class_name"), str(folder)
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelError(
            f"names no pipeline of diffusers ({name!r})",
            where=where,
            hint="pipelines with their own code are not loaded",
        )
    if _NEEDS_IMAGE.search(name):
        raise ModelError(
            f"is a {name}, which needs an input image", where=where, hint="give a text-to-image checkpoint"
        )
    if _NO_IMAGE.search(name):
        raise ModelError(
            f"is a {name}, which makes no image from a text", where=where, hint="give a text-to-image checkpoint"
        )


def _refuse_settings(config: GeneratorConfig, pipeline: str) -> None:
    own = {
        "switches": config.switches is not None,
        "guided_share": config.guided_share < 1,
        "cache_interval": config.cache_interval > 1,
    }
    for key in (key for key, used in own.items() if used):
        raise ConfigError(
            f"works only in memscan's own sampling loop, and {config.path} is sampled by the stock {pipeline}",
            where=f"generator.{key}",
            hint="leave it out",
        )


def _config(part: Path, name: str = "config.json") -> dict[str, Any]:
    return read_config(part / name) if (part / name).is_file() else {}
