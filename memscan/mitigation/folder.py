"""A mitigated model as an ordinary diffusers folder: everything of the original, and another UNet.

The folder is built beside its place under a temporary name and renamed, so that nobody ever sees half of it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memscan.errors import MemscanError
from memscan.models.checkpoint import load_unet
from memscan.models.folders import CHECKPOINT_PARTS, check_checkpoint
from memscan.models.quiet import quiet_libraries


def load_original_unet(folder: Path) -> Any:
    """The UNet of a diffusers folder, in the precision that it is stored in. Raises ModelError for a broken one."""
    check_checkpoint(folder)
    return load_unet(folder / "unet", "stored")


def write_folder(original: Path, unet: Any, out: Path, more: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a checkpoint with another UNet, whole or not at all.

    Args:
        original: the diffusers folder that the other parts are copied from.
        unet: a `UNet2DConditionModel`.
        out: must not exist.
        more: adds files (card, patch) to the folder before it appears.

    Raises:
        MemscanError: `out` exists, or cannot be written.
    """
    if out.exists():
        raise MemscanError("is there already, and is not overwritten", where=str(out), hint="choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for part in CHECKPOINT_PARTS:
            if part == "unet":
                continue
            source = original / part
            if source.is_dir():
                shutil.copytree(source, temporary / part)
            else:
                shutil.copy2(source, temporary / part)
        with quiet_libraries():
            unet.save_pretrained(str(temporary / "unet"), safe_serialization=True)
        more(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise MemscanError(f"cannot write the checkpoint ({error.strerror or error})", where=str(out)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
