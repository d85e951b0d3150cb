"""This module gives the folder of a configured checkpoint.

It is the given folder, or a base in which the parts that a training wrote, or those of a single file
(`single_file.py`), replace the original ones.

A base with other parts is a folder of symbolic links in the cache, whose name says what it consists of; so every
reader of checkpoints sees an ordinary diffusers folder, and the files behind the links are hashed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from memscan.config import GeneratorConfig
from memscan.errors import MemscanError, ModelError
from memscan.io.cache import cache_folder
from memscan.models.folders import read_config, resolve_folder
from memscan.models.identify import loras_in, not_a_checkpoint
from memscan.models.local_copy import stage_file
from memscan.models.lora_files import lora_file
from memscan.models.single_file import is_single_file, opened

DENOISERS = ("unet", "transformer")


def resolve_checkpoint(config: GeneratorConfig, patterns: Sequence[str]) -> Path:
    """Return the local folder of a configured checkpoint.

    Args:
        patterns: files of a hub id that are fetched, see `folders.resolve_folder`.

    Raises:
        ModelError: there is no such folder, or what was trained, or a single file, does not go with the base.
    """
    if config.base is None:
        return resolve_folder(config.path, config.revision, patterns)
    base = resolve_folder(config.base, config.revision, patterns).resolve()
    if not (base / "model_index.json").is_file():
        raise ModelError(
            "has no model_index.json", where=str(base), hint="generator.base must be a whole diffusers folder"
        )
    if is_single_file(config.path):
        return opened(stage_file(config.path), base)
    folder = resolve_folder(config.path, None)
    trained = _trained(folder, base)
    named = {lora_file(lora.path).resolve() for lora in config.loras}
    if left := [file for file in loras_in(folder) if file.resolve() not in named]:
        raise ModelError(
            f"has a LoRA beside what was trained ({left[0].name}), which is not applied",
            where=str(folder),
            hint=f"name it under generator.loras ([{{path: {left[0]}}}]), or move it out of the folder",
        )
    return _linked(base, {part: folder.resolve() for part, folder in trained.items()})


def _trained(folder: Path, base: Path) -> dict[str, Path]:
    """Return what a training wrote: the base's parts by name, each with the folder that replaces it.

    Raises:
        ModelError: there is no such part, one that the base lacks, or one of them twice (`unet/` and `unet_ema/`).
    """
    if (folder / "model_index.json").is_file():
        raise ModelError(
            "is a whole checkpoint, which needs no base",
            where=str(folder),
            hint="leave generator.base out, or give the part that is meant, e.g. its unet/",
        )
    if (folder / "config.json").is_file():
        return {_part_of(folder, base): folder}
    inner = [one for one in sorted(folder.iterdir()) if (one / "config.json").is_file()]
    denoisers = [one for one in inner if _stem(one) in DENOISERS]
    if not inner:
        raise not_a_checkpoint(folder)
    if len(denoisers) != 1:
        names = " and ".join(f"{one.name}/" for one in denoisers) or "neither unet/ nor transformer/"
        raise ModelError(
            f"has {names}",
            where=str(folder),
            hint="give the one that you mean as generator.path, e.g. its unet_ema/",
        )
    # Whatever else was trained with the denoiser is sampled with it: DreamBooth writes its text encoder, too.
    return {_part_of(one, base): one for one in inner}


def _stem(folder: Path) -> str:
    """Return the name of a part without what a trainer adds to it, as in `unet_ema`."""
    first = folder.name.split("_")[0]
    return first if first in DENOISERS else folder.name.removesuffix("_ema")


def _part_of(folder: Path, base: Path) -> str:
    """Return which part of the base a folder replaces, by its class, and its name where there are several of that."""
    from memscan.models.adapters import components

    facts = read_config(folder / "config.json")
    kind = str(facts.get("_class_name") or next(iter(facts.get("architectures") or []), None))
    listed = components(read_config(base / "model_index.json"))
    fitting = [part for part, (_, known) in listed.items() if known == kind]
    if _stem(folder) in fitting:
        return _stem(folder)
    if len(fitting) == 1:
        return fitting[0]
    of = read_config(base / "model_index.json").get("_class_name")
    what = f"is a {kind}, and the {of} of generator.base has {'several' if fitting else 'no such part'}"
    raise ModelError(what, where=str(folder), hint="give the base that was trained, and a part that it has")


def _linked(base: Path, trained: Mapping[str, Path]) -> Path:
    """A folder of links to the base's entries, and to trained parts. Made once; raises MemscanError if it cannot."""
    folders = list(trained.values())
    known = [one.name for one in folders if len(folders) > 1 or _stem(one) in trained]
    name = "-".join([folders[0].parent.name, *known]) if known else folders[0].name
    entries = {one.name: one for one in sorted(base.iterdir()) if not one.name.startswith(".")} | dict(trained)
    key = hashlib.sha256("\0".join(f"{entry}={place}" for entry, place in sorted(entries.items())).encode()).hexdigest()
    target = cache_folder() / "composed" / key[:16] / name
    if target.is_dir():
        return target
    temporary = target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        for entry, place in entries.items():
            (temporary / entry).symlink_to(place)
        os.replace(temporary, target)
    except OSError as error:
        if target.is_dir():  # another process was first
            return target
        raise MemscanError(
            f"cannot write the cache ({error})", where=str(target.parent), hint="set MEMSCAN_CACHE to a folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
