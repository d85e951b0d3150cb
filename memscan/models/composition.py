"""This module gives the folder of a configured checkpoint.

It is the given folder, or a base in which a training's part, or the parts of a single file (`single_file.py`), replace
the original ones.

A base with another denoiser is a folder of symbolic links in the cache, whose name says what it consists of; so every
reader of checkpoints sees an ordinary diffusers folder, and what is hashed are the files behind the links.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from memscan.config import GeneratorConfig
from memscan.errors import MemscanError, ModelError
from memscan.io.cache import cache_folder
from memscan.models.folders import read_config, resolve_folder
from memscan.models.local_copy import stage_file
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
    part, trained = _trained(resolve_folder(config.path, None))
    if not (base / part).is_dir():
        raise ModelError(f"has no {part}/ to be replaced", where=str(base), hint="give the base that was trained")
    return _linked(base, part, trained.resolve())


def _trained(folder: Path) -> tuple[str, Path]:
    """Return the name of the part that a training wrote, and its folder."""
    if (folder / "config.json").is_file():
        kind = str(read_config(folder / "config.json").get("_class_name"))
        return ("unet" if kind.startswith("UNet") else "transformer"), folder
    found = [one for one in sorted(folder.iterdir()) if one.is_dir() and one.name.split("_")[0] in DENOISERS]
    if len(found) != 1:
        names = " and ".join(f"{one.name}/" for one in found) or "neither unet/ nor transformer/"
        raise ModelError(
            f"has {names}",
            where=str(folder),
            hint="give the one that you mean as generator.path, e.g. its unet_ema/",
        )
    return found[0].name.split("_")[0], found[0]


def _linked(base: Path, part: str, trained: Path) -> Path:
    """A folder of links to the base's entries, and to the trained part. Made once; raises MemscanError if it cannot."""
    name = f"{trained.parent.name}-{trained.name}" if trained.name.split("_")[0] in DENOISERS else trained.name
    entries = {one.name: one for one in sorted(base.iterdir()) if not one.name.startswith(".")} | {part: trained}
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
