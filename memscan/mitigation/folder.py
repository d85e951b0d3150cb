"""This module writes a mitigated model as an ordinary diffusers folder with everything of the original but the UNet.

The folder is built beside its place under a temporary name and renamed, so that nobody ever sees half of it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from memscan.errors import MemscanError, ModelError
from memscan.models.checkpoint import load_unet
from memscan.models.folders import CHECKPOINT_PARTS, check_checkpoint, find_weights, read_config

_DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def load_original_unet(folder: Path) -> Any:
    """Load the UNet of a diffusers folder in its stored precision. Raises ModelError if it is broken."""
    check_checkpoint(folder)
    return load_unet(folder / "unet", "stored")


def write_folder(original: Path, unet: Any, out: Path, more: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a checkpoint with another UNet, completely or not at all.

    All other parts are copied as they are, safety checker and image processor included. The UNet keeps every file of
    safetensors and every precision that it was stored in, and tensors that did not change keep their bytes: so taking a
    change back gives the original's files again. Its weights in other formats are left out, for nothing changed them.

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
        for source in _kept(original):
            if source.is_dir():
                shutil.copytree(source, temporary / source.name)
            else:
                shutil.copy2(source, temporary / source.name)
        _write_unet(original / "unet", unet, temporary / "unet")
        more(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise MemscanError(f"cannot write the checkpoint ({error.strerror or error})", where=str(out)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _kept(original: Path) -> list[Path]:
    """Return what is copied: `model_index.json` and all folders that it lists but the UNet's."""
    index = original / "model_index.json"
    parts = [name for name, value in read_config(index).items() if isinstance(value, list) and "/" not in name]
    names = dict.fromkeys([*CHECKPOINT_PARTS[1:], *parts])
    return [index, *(original / name for name in names if name != "unet" and (original / name).is_dir())]


def _write_unet(original: Path, unet: Any, out: Path) -> None:
    """Copies of the original's files, with the changed tensors written over the old ones in each file's precision.

    Raises:
        ModelError: a changed tensor is in no file of the original.
    """
    out.mkdir()
    known = find_weights(original, "diffusion_pytorch_model").files
    # The parameters as they are stored where the folder has several precisions: in the one that was loaded.
    tensors = {name: tensor.detach().cpu() for name, tensor in unet.state_dict().items()}
    changed = {name for file in known for name, old in _tensors(file) if _differ(old, tensors[name])}
    for source in sorted(original.iterdir()):
        if source.is_file() and (source.suffix == ".safetensors" or source.suffix == ".json"):
            shutil.copyfile(source, out / source.name)
        if source.suffix == ".safetensors":
            _overwrite(out / source.name, {name: tensors[name] for name in changed})


def _differ(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    return not torch.equal(stored.float(), tensor.to(stored.dtype).float())  # 8-bit types have no comparison


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (no mapping)
            yield name, weights.get_tensor(name)


def _overwrite(file: Path, values: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a safetensors file in place: 8 bytes of the header's length, a JSON header, then the data."""
    with file.open("r+b") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        places = json.loads(opened.read(length))
        for name in sorted(values.keys() & places.keys()):
            place = places[name]
            tensor = values[name].to(_DTYPES[place["dtype"]]).contiguous().reshape(-1)
            data = tensor.view(torch.uint8).numpy().tobytes()
            start, stop = place["data_offsets"]
            if stop - start != len(data):
                raise ModelError(f"tensor {name} is of another size", where=str(file))
            opened.seek(8 + length + start)
            opened.write(data)
