"""This module keeps changed tensors in a file, which can be applied to the original UNet and reverted.

A patch holds the new values of the changed tensors only, with the hashes of the folder that it was made for and of
the folder that it makes; `taken back` needs the old values, which the file holds beside the new ones. The metadata is
text, the format safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from memscan.errors import IntegrityError, ModelError
from memscan.io import storage
from memscan.models.folders import first_line

FORMAT = "memscan-patch/1"
_NEW, _OLD = "new.", "old."


@dataclass(frozen=True)
class Patch:
    """A patch holds tensors by parameter name of the UNet, before and after."""

    old: dict[str, Tensor]
    new: dict[str, Tensor]
    original: str | None = None  # hash of the folder that it was made for, where it says so

    @classmethod
    def between(cls, original: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Patch:
        """Return the tensors of `changed` that differ from `original`.

        Raises:
            ModelError: `changed` names a tensor that the original has not, or has in another shape.
        """
        for name, tensor in changed.items():
            if name not in original or original[name].shape != tensor.shape:
                raise ModelError(
                    f"the original has no tensor {name} of shape {list(tensor.shape)}",
                    where="patch",
                    hint="the patch belongs to another architecture",
                )
        names = [
            name
            for name, tensor in changed.items()
            if not torch.equal(original[name].cpu(), _like(tensor, original[name]))
        ]
        return cls(
            {name: original[name].detach().cpu().clone() for name in names},
            {name: _like(changed[name], original[name]).clone() for name in names},
        )

    @property
    def changed_weights(self) -> int:
        """Count the weights whose value differs from before."""
        return sum(int((self.old[name] != self.new[name]).sum()) for name in self.new)

    def save(self, path: str, metadata: Mapping[str, str] | None = None) -> None:
        """Write the patch, atomically."""
        tensors = {_NEW + name: tensor.contiguous() for name, tensor in self.new.items()}
        tensors |= {_OLD + name: tensor.contiguous() for name, tensor in self.old.items()}
        facts = {**(metadata or {}), "format": FORMAT, "tensors": json.dumps(sorted(self.new))}
        storage.write_atomic(path, save(tensors, facts))

    @classmethod
    def load(cls, path: str) -> Patch:
        """Read a patch. Raises ModelError if the file is not a patch."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ModelError(f"is not a patch ({FORMAT})", where=path)
                facts = dict(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot be read as a patch ({first_line(error)})", where=path) from error
        old = {name.removeprefix(_OLD): tensor for name, tensor in tensors.items() if name.startswith(_OLD)}
        new = {name.removeprefix(_NEW): tensor for name, tensor in tensors.items() if name.startswith(_NEW)}
        if wrong := _wrong(old, new, len(tensors)):
            raise ModelError(f"is not a complete patch ({wrong})", where=path, hint="nothing was written")
        return cls(old, new, facts.get("original"))

    def apply(self, unet: nn.Module) -> None:
        """Make the change in place.

        Raises:
            ModelError: the UNet has another architecture.
            IntegrityError: its tensors are not those that the patch was made for.
        """
        self._exchange(unet, self.old, self.new, "the patch was made for another checkpoint, or is applied already")

    def revert(self, unet: nn.Module) -> None:
        """Revert the change in place. Raises as `apply` does."""
        self._exchange(unet, self.new, self.old, "the patch is not applied to this checkpoint")

    def _exchange(self, unet: nn.Module, present: dict[str, Tensor], wanted: dict[str, Tensor], hint: str) -> None:
        parameters = dict(unet.named_parameters())
        if wrong := _wrong(present, wanted, 2 * len(present)):
            raise ModelError(f"is not a complete patch ({wrong})", where="patch", hint="nothing was written")
        for name, tensor in present.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ModelError(f"has no tensor {name} of shape {list(tensor.shape)}", where="unet", hint=hint)
            if not torch.equal(_like(tensor, parameters[name]), parameters[name].detach().cpu()):
                raise IntegrityError(
                    f"tensor {name} does not have the values that the patch expects", where="unet", hint=hint
                )
        with torch.no_grad():
            for name, tensor in wanted.items():
                parameters[name].copy_(tensor)


def _wrong(old: Mapping[str, Tensor], new: Mapping[str, Tensor], tensors: int) -> str | None:
    """What keeps tensors from being a patch: applied, it would change another thing than it says, or not go back."""
    if unpaired := sorted(old.keys() ^ new.keys()):
        return f"{unpaired[0]} is there {'before' if unpaired[0] in old else 'after'} the change only"
    if not new:
        return "it changes nothing"
    if tensors != len(old) + len(new):
        return "it holds tensors that are neither old nor new"
    for name, tensor in new.items():
        if tensor.shape != old[name].shape or tensor.dtype != old[name].dtype:
            return f"{name} has another shape or precision before than after"
        if not (torch.isfinite(tensor).all() and torch.isfinite(old[name]).all()):
            return f"{name} holds numbers that are not finite"
    return None


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """On the host, in the other's precision: folders may store half of what a model computes in."""
    return tensor.detach().to("cpu", other.dtype)


def patch_folder(original: str | Path, patch: Patch, out: Path, *, reverse: bool = False) -> None:
    """Copy a diffusers folder with a patch applied to its UNet, or reverted; `out` must not exist.

    Raises:
        ModelError, IntegrityError: as `Patch.apply`, or the folder is not a checkpoint. Nothing is written then.
    """
    from memscan.mitigation.folder import load_original_unet, write_folder

    unet = load_original_unet(Path(original))
    (patch.revert if reverse else patch.apply)(unet)
    write_folder(Path(original), unet, out)
