"""This module handles value units of cross-attention: the outputs of `attn2.to_v`, named by layer and row.

A unit that gives 0 whatever the text is the same as a row of zeros in its weight, so what hooks do while one searches
(`switched_off`) a saved checkpoint does for good (`zeroed_rows`). NeMo (Hintersdorf et al. 2024) looks at the down
blocks and the middle block; any other part of the UNet can be named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memscan.errors import ModelError

Unit = tuple[str, int]
BLOCKS = ("down_blocks", "mid_block", "up_blocks")
PUBLISHED_BLOCKS = ("down_blocks", "mid_block")
_SUFFIX = ".attn2.to_v"


@dataclass(frozen=True)
class Layout:
    """A layout lists the considered layers, in the order of the network, and the number of units of each."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, unet: nn.Module, blocks: Sequence[str] = PUBLISHED_BLOCKS) -> Layout:
        """Return the cross-attention layers of a UNet.

        Raises:
            ModelError: the named blocks have none, or one is no linear layer.
        """
        found = {name: module for name, module in unet.named_modules() if name.endswith(_SUFFIX)}
        # Modules are registered down, up, middle; units are listed in the order in which they run.
        names = sorted((name for name in found if name.startswith(tuple(blocks))), key=_position)
        if not names:
            raise ModelError(f"has no cross-attention in {', '.join(blocks)}", where="unet")
        wrong = [name for name in names if not isinstance(found[name], nn.Linear)]
        if wrong:
            raise ModelError(f"{wrong[0]} is a {type(found[wrong[0]]).__name__}, not a linear layer", where="unet")
        return cls(tuple(names), tuple(int(found[name].out_features) for name in names))

    @property
    def count(self) -> int:
        """This is the number of all units."""
        return sum(self.sizes)

    def split(self, values_NU: Tensor) -> list[Tensor]:
        """Return columns of a matrix over all units, layer by layer."""
        return list(torch.split(values_NU, list(self.sizes), dim=-1))

    def unit(self, flat: int) -> Unit:
        """Return the unit at a flat position in [0, count)."""
        for name, size in zip(self.names, self.sizes, strict=True):
            if flat < size:
                return name, flat
            flat -= size
        raise IndexError(flat)

    def mask(self, units: UnitSet) -> Tensor:
        """Return 1 for units left on and 0 for units switched off, float32 (count,).

        Raises ModelError for a foreign unit.
        """
        starts = dict(zip(self.names, torch.tensor([0, *self.sizes]).cumsum(0).tolist(), strict=False))
        sizes = dict(zip(self.names, self.sizes, strict=True))
        mask_U = torch.ones(self.count)
        for name, row in units:
            if name not in starts or not 0 <= row < sizes[name]:
                raise ModelError(f"has no unit {row} of {name}", where="unet", hint="the units belong to another model")
            mask_U[starts[name] + row] = 0
        return mask_U


def _position(name: str) -> tuple[int, tuple[int | str, ...]]:
    parts = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    return next(rank for rank, block in enumerate(BLOCKS) if name.startswith(block)), parts[1:]


@dataclass(frozen=True)
class UnitSet:
    """This is a set of units. Two sets with the same units are equal, in whatever order they were found."""

    units: frozenset[Unit] = field(default_factory=frozenset)

    @classmethod
    def of(cls, units: Iterable[Unit]) -> UnitSet:
        return cls(frozenset(units))

    @classmethod
    def from_json(cls, layers: Mapping[str, Sequence[int]]) -> UnitSet:
        return cls.of((name, int(row)) for name, rows in layers.items() for row in rows)

    def to_json(self) -> dict[str, list[int]]:
        """Return the sorted rows of each layer; layers without a unit are left out."""
        layers: dict[str, list[int]] = {}
        for name, row in sorted(self.units):
            layers.setdefault(name, []).append(row)
        return layers

    def __iter__(self) -> Iterator[Unit]:
        return iter(sorted(self.units))

    def __len__(self) -> int:
        return len(self.units)

    def __or__(self, other: UnitSet) -> UnitSet:
        return UnitSet(self.units | other.units)

    def __sub__(self, other: UnitSet) -> UnitSet:
        return UnitSet(self.units - other.units)

    def in_layer(self, name: str) -> UnitSet:
        return UnitSet(frozenset(unit for unit in self.units if unit[0] == name))


def union(sets: Iterable[UnitSet]) -> UnitSet:
    """Return all units of the sets."""
    return UnitSet(frozenset[Unit]().union(*(one.units for one in sets)))


@contextmanager
def gated(unet: nn.Module, layout: Layout, mask_BU: Tensor) -> Iterator[None]:
    """Multiply the units' outputs by a mask inside a `with` block.

    Args:
        mask_BU: (1, count) for all rows of a batch, or one row per batch row.
    """
    handles = []
    for name, part_BN in zip(layout.names, layout.split(mask_BU), strict=True):
        if bool((part_BN != 1).any()):
            layer = unet.get_submodule(name)
            handles.append(layer.register_forward_hook(_gate(part_BN[:, None, :])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gate(mask_B1N: Tensor) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * mask_B1N.to(output)

    return hook


@contextmanager
def switched_off(unet: nn.Module, layout: Layout, units: UnitSet) -> Iterator[None]:
    """Set the outputs of units to 0 inside a `with` block.

    Raises ModelError for a unit that the model does not have.
    """
    with gated(unet, layout, layout.mask(units)[None]):
        yield


def zeroed_rows(unet: nn.Module, units: UnitSet) -> dict[str, Tensor]:
    """Return the weights (and biases, if there are any) of the units' layers with the units' rows at zero, by parameter
    name; the UNet itself is not changed. Raises ModelError for a unit that the model has not."""
    changed: dict[str, Tensor] = {}
    parameters = dict(unet.named_parameters())
    for name, rows in units.to_json().items():
        if f"{name}.weight" not in parameters or max(rows) >= len(parameters[f"{name}.weight"]):
            raise ModelError(
                f"has no unit {max(rows)} of {name}", where="unet", hint="the units belong to another model"
            )
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in parameters:
                tensor = parameters[key].detach().clone()
                tensor[rows] = 0
                changed[key] = tensor
    return changed
