"""This module runs NeMo (Hintersdorf et al., NeurIPS 2024, section 3.3), which finds the value units of one prompt.

1. Candidates are units with an unusual activation, |z| > θ, and the k strongest units of each layer. θ starts at
   5 and falls by .25, k starts at 0 and rises by 1, until the score with all of them off is under the threshold.
2. In the refinement, layers (the last one first) and then single units are switched on again, as long as the score
   stays under the threshold. Units that could be switched on did not matter.

As in the published code, only seeds that show memorisation are used, and a prompt without such a seed has no units. If
θ reaches its end while the score is above the threshold, the refinement uses this score as the threshold.

A small model has few units, and its memorisation is spread over many of them. k = 16 has a large effect in a model with
5,760 units, but a small one in layers of 128 units. `extend` lets k rise further, by fiftieths of a layer, up to that
share of all units. `rank = "excess"` takes the units that are most above their ordinary activation, instead of the
strongest units, which serve every caption. Neither is published, and both are off by default (docs/mitigation.md shows
their effect).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from memscan.mitigation.activations import ActivationStatistics, value_activations
from memscan.mitigation.score import NoiseScore
from memscan.mitigation.units import Layout, UnitSet

# Where the search ends, by whom: the paper names 1, the authors' code leaves its loop one round before, with k = 15.
THETA_END = {"paper": 1.0, "code": 1.25}


@dataclass(frozen=True)
class NemoSettings:
    """These are the settings of the search, with the published values."""

    theta: float = 5.0
    theta_step: float = 0.25
    theta_end: float = 1.0  # the paper's; see THETA_END
    top_k: bool = True
    rank: Literal["activation", "excess"] = "activation"
    extend: float = 0.0


@dataclass(frozen=True)
class Found:
    """This is the outcome of the search for one prompt.

    Attributes:
        units: to be switched off; empty if the prompt shows no memorisation.
        candidates: units before the refinement.
        score: mean similarity between seeds, everything on.
        left: similarity of the delta without and with `units` off, the highest over the seeds that showed
            memorisation; 1 if there are none.
        seeds: how many seeds showed memorisation.
        reached: whether the candidates brought the score under the threshold.
        theta: at which the candidates were found; k follows from it.
        calls: denoiser rows spent.
    """

    units: UnitSet
    candidates: int
    score: float
    left: float
    seeds: int
    reached: bool
    theta: float
    calls: int


def search(
    text_TD: Tensor,
    score: NoiseScore,
    statistics: ActivationStatistics,
    threshold: float,
    settings: NemoSettings = NemoSettings(),
) -> Found:
    """Find the units of one prompt.

    Args:
        text_TD: the prompt's embedding.
        threshold: of this model, see `score.Threshold`.
    """
    deltas = score.deltas(text_TD)
    pairs = score.pairwise(deltas)
    count = len(pairs)
    mean = float(pairs.sum() / (count * (count - 1)))
    rows = (pairs.amax(dim=1) > threshold).nonzero().flatten()
    if len(rows) == 0:
        return Found(UnitSet(), 0, mean, 1.0, 0, True, settings.theta, count)
    blocked = BlockedScore(score, text_TD, deltas[rows], rows)
    activations_U = value_activations(score.denoiser.unet, score.layout, text_TD[None].to(score.denoiser.device))[0]
    z_U = statistics.z(activations_U[None])[0]
    strength_U = activations_U if settings.rank == "activation" else activations_U - statistics.mean_U.to(activations_U)
    for theta, k in _schedule(settings, score.layout):
        chosen = candidates(strength_U, z_U, score.layout, theta, k)
        left = blocked(chosen)
        full = len(chosen) >= settings.extend * score.layout.count
        if left <= threshold or (theta <= settings.theta_end and full):
            break
    reached = left <= threshold
    units = refine(chosen, score.layout, blocked, threshold if reached else left)
    return Found(units, len(chosen), mean, blocked(units), len(rows), reached, theta, count + blocked.calls)


def _schedule(settings: NemoSettings, layout: Layout) -> Iterator[tuple[float, int]]:
    """θ and k of each round: as published, then, where the search is extended, k by fiftieths of the largest layer."""
    rounds = round((settings.theta - settings.theta_end) / settings.theta_step)
    for number in range(rounds + 1):
        yield settings.theta - number * settings.theta_step, number if settings.top_k else 0
    largest = max(layout.sizes)
    step = max(1, largest // 50)
    for k in range(rounds + step, largest + step, step) if settings.extend > 0 else ():
        yield settings.theta_end, k


def candidates(strength_U: Tensor, z_U: Tensor, layout: Layout, theta: float, k: int) -> UnitSet:
    """Return the units with |z| > θ, and the k most strongly driven units of each layer."""
    chosen = []
    for name, strength, z in zip(layout.names, layout.split(strength_U), layout.split(z_U), strict=True):
        rows = set((z.abs() > theta).nonzero().flatten().tolist())
        rows |= set(strength.topk(min(k, len(strength))).indices.tolist())
        chosen += [(name, int(row)) for row in rows]
    return UnitSet.of(chosen)


def refine(chosen: UnitSet, layout: Layout, left: Callable[[UnitSet], float], threshold: float) -> UnitSet:
    """Drop layers, then units, whose return leaves the score at or under the threshold; the last layer first."""
    units = chosen
    for name in reversed(layout.names):
        layer = units.in_layer(name)
        if len(layer) and left(units - layer) <= threshold:
            units = units - layer
    for name in reversed(layout.names):
        for unit in units.in_layer(name):
            one = UnitSet.of([unit])
            if left(units - one) <= threshold:
                units = units - one
    return units


class BlockedScore:
    """This is the score of one prompt with units off. It counts denoiser rows and computes each set only once."""

    def __init__(self, score: NoiseScore, text_TD: Tensor, before_SCHW: Tensor, rows: Tensor) -> None:
        self._score, self._text, self._before, self._rows = score, text_TD, before_SCHW, rows
        self._known: dict[UnitSet, float] = {UnitSet(): 1.0}
        self.calls = 0

    @classmethod
    def of(cls, score: NoiseScore, text_TD: Tensor, threshold: float) -> BlockedScore | None:
        """Return the score of a prompt over the seeds that show memorisation; None if no seed does."""
        deltas = score.deltas(text_TD)
        rows = (score.pairwise(deltas).amax(dim=1) > threshold).nonzero().flatten()
        return cls(score, text_TD, deltas[rows], rows) if len(rows) else None

    def __call__(self, off: UnitSet) -> float:
        if off not in self._known:
            self.calls += len(self._rows)
            self._known[off] = self._score.left(self._text, self._before, off, self._rows)
        return self._known[off]
