"""This module measures how strongly a caption drives each value unit, and how strongly ordinary captions do.

The activation of a unit is the mean over the tokens of |W_V y| (NeMo, section 3.1): it depends on the text alone, so
no denoiser call is needed. Statistics are sums in double precision by chunks that are added up in a fixed order, so
that they are the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memscan.mitigation.units import Layout

# A unit that no ordinary caption moves has no spread to measure by.
SMALLEST_SPREAD = 1e-6


@torch.no_grad()
def value_activations(unet: nn.Module, layout: Layout, text_NTD: Tensor) -> Tensor:
    """Return the mean over tokens of the units' absolute outputs, float32 (N, units)."""
    columns = []
    for name in layout.names:
        layer = unet.get_submodule(name)
        columns.append(layer(text_NTD.to(next(layer.parameters()).dtype)).float().abs().mean(dim=1))
    return torch.cat(columns, dim=1)


@dataclass(frozen=True)
class Moments:
    """These are count, sum and sum of squares of each unit's activation, float64 (units,)."""

    count: int
    sum_U: Tensor
    square_U: Tensor

    @classmethod
    def of(cls, activations_NU: Tensor) -> Moments:
        values = activations_NU.double()
        return cls(len(values), values.sum(dim=0), values.square().sum(dim=0))


@dataclass(frozen=True)
class ActivationStatistics:
    """These are mean and standard deviation (population) of each unit over ordinary captions, float32 (units,)."""

    count: int
    mean_U: Tensor
    spread_U: Tensor

    @classmethod
    def join(cls, chunks: Iterable[Moments]) -> ActivationStatistics:
        """Return the statistics of all chunks, added in the order given.

        Raises ValueError for fewer than two captions.
        """
        count, total, square = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for chunk in chunks:
            count, total, square = count + chunk.count, total + chunk.sum_U, square + chunk.square_U
        if count < 2:
            raise ValueError(f"{count} ordinary captions have no spread")
        mean = total / count
        spread = (square / count - mean.square()).clamp_min(0).sqrt()
        return cls(count, mean.float(), spread.clamp_min(SMALLEST_SPREAD).float())

    def z(self, activations_NU: Tensor) -> Tensor:
        """Return (a - mean) / spread."""
        return (activations_NU - self.mean_U.to(activations_NU)) / self.spread_U.to(activations_NU)
