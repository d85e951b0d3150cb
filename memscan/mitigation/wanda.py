"""This module runs Wanda for memorisation (Chavhan et al. 2024): it finds weights that only memorised prompts use.

Of the second linear layer of every feed-forward block (`ff.net.2`), S = |W_ij| ‖A_j‖₂ with A the layer's inputs over
a set of prompts, its rows scaled to unit length. A weight is masked at a timestep if its S over the memorised prompts
is in the top share of its row, and above its S over as many empty prompts. The union of the masks of the first
timesteps is set to zero for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memscan.errors import ModelError

_SUFFIX = ".ff.net.2"


def layers(unet: nn.Module) -> list[str]:
    """Return the names of the layers that Wanda prunes. Raises ModelError if a UNet has none."""
    names = [name for name, module in unet.named_modules() if name.endswith(_SUFFIX) and isinstance(module, nn.Linear)]
    if not names:
        raise ModelError("has no feed-forward layers (ff.net.2)", where="unet")
    return names


class InputNorms:
    """This sums the squares of the layers' inputs, by layer and timestep, while sampling runs.

    The sampling loop's denoiser calls are distinguished by `step`. With guidance the rows with the caption count, the
    second half of a batch; in the authors' code (github.com/ruchikachavhan/concept-prune at 72927d9) both halves do.

    Args:
        halved: whether to leave out the first half of every batch, which has no caption.
    """

    def __init__(self, unet: nn.Module, *, halved: bool) -> None:
        self.names, self._unet, self._halved = layers(unet), unet, halved
        self.step = 0
        self.squares: dict[tuple[str, int], Tensor] = {}

    @contextmanager
    def recording(self, steps: int) -> Iterator[None]:
        """Collect during the first `steps` denoiser calls after the block's beginning."""
        self.step = -1
        count = self._unet.register_forward_pre_hook(self._next)
        handles = [self._unet.get_submodule(name).register_forward_hook(self._hook(name, steps)) for name in self.names]
        try:
            yield
        finally:
            for handle in (count, *handles):
                handle.remove()

    def _next(self, _module: nn.Module, _inputs: Any) -> None:
        self.step += 1

    def _hook(self, name: str, steps: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            if self.step >= steps:
                return
            rows = inputs[0]
            if self._halved:
                rows = rows.chunk(2)[1]
            unit = F.normalize(rows.reshape(-1, rows.shape[-1]).float(), dim=1)
            key = (name, self.step)
            self.squares[key] = self.squares.get(key, torch.zeros(())) + unit.square().sum(dim=0).double().cpu()

        return hook


def scores(weight_OI: Tensor, square_I: Tensor) -> Tensor:
    """Return |W_ij| ‖A_j‖₂, float32 (out, in)."""
    return weight_OI.detach().float().abs().cpu() * square_I.sqrt().float()


def mask(memorised_OI: Tensor, base_OI: Tensor, share: float) -> Tensor:
    """Return the weights in the top `share` of their row by the memorised score that are also above the base score.

    At least one weight per row is in the top share.
    """
    count = max(1, int(memorised_OI.shape[1] * share))
    top = torch.zeros_like(memorised_OI, dtype=torch.bool)
    top.scatter_(1, memorised_OI.topk(count, dim=1).indices, True)
    return top & (memorised_OI > base_OI)


def selection(
    unet: nn.Module,
    memorised: Sequence[dict[tuple[str, int], Tensor]],
    base: Sequence[dict[tuple[str, int], Tensor]],
    share: float = 0.01,
) -> dict[str, Tensor]:
    """Return the weights to be set to zero, boolean masks by parameter name; layers without any are left out.

    Args:
        memorised, base: `InputNorms.squares` of any number of workers, added up in the order given.
        share: of each row.

    Raises:
        ValueError: the two were not collected over the same layers and steps.
    """
    first, second = _sum(memorised), _sum(base)
    if first.keys() != second.keys() or not first:
        raise ValueError("memorised and base inputs were collected over different layers or steps")
    chosen: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for name, _ in first):
        weight: Tensor = unet.get_parameter(f"{name}.weight")
        found = torch.zeros_like(weight, dtype=torch.bool, device="cpu")
        for key in first:
            if key[0] == name:
                found |= mask(scores(weight, first[key]), scores(weight, second[key]), share)
        if found.any():
            chosen[f"{name}.weight"] = found
    return chosen


def prune(unet: nn.Module, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pruned weights by parameter name; the UNet is not changed.

    Args:
        chosen: as `selection` gives them.
    """
    return {
        name: (weight := unet.get_parameter(name)).detach().masked_fill(one.to(weight.device), 0)
        for name, one in chosen.items()
    }


def _sum(parts: Sequence[dict[tuple[str, int], Tensor]]) -> dict[tuple[str, int], Tensor]:
    total: dict[tuple[str, int], Tensor] = {}
    for part in parts:
        for key, square in part.items():
            total[key] = total[key] + square if key in total else square
    return total
