"""This module runs the attack inside a training, with searches that continue from one epoch to the next.

The published training (Kowalczuk et al. 2025, "Finding DoRI") searches again in every epoch, once per image. A search
of 50 steps costs more denoiser rows than the training that follows it, and its result is out of date after the first of
these training steps. Here a few searches per image continue from epoch to epoch. In each epoch every search takes some
steps on the current model, so that the training sees embeddings at every stage of a search. After its number of epochs,
a search begins again from another kind of starting point and with other noise. These restarts are spread over the
epochs.

One search per image with a life of one epoch is the published training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memscan.mitigation.attack import STARTS, Start, start_embedding
from memscan.records import sample_seed


@dataclass(frozen=True)
class Search:
    """This is one search in one epoch.

    Attributes:
        target: number of the image that is to come back.
        fresh: whether it begins again in this epoch, from `start`.
        unrelated: number of the ordinary prompt that it begins from where it begins from one.
        seed: of a start from noise, and of the epoch's noise and timesteps. No verification draws from these.
    """

    target: int
    fresh: bool
    start: Start
    unrelated: int
    seed: int


def schedule(targets: int, each: int, life: int, epoch: int, seed: int, ordinary: int) -> list[Search]:
    """Return all searches of an epoch, `each` per target, in a fixed order.

    Args:
        life: epochs that a search is carried on for.
        ordinary: number of ordinary prompts to begin from.
    """
    found = []
    for slot in range(targets * each):
        target, place = divmod(slot, each)
        # In the first epoch all begin; their births are spread by giving some of them a shorter first life.
        lives, age = divmod(epoch + slot % life, life)
        found.append(
            Search(
                target,
                fresh=age == 0 or epoch == 0,
                start=STARTS[(target + place + lives) % len(STARTS)],
                unrelated=(slot + 31 * lives) % ordinary,
                seed=sample_seed(f"train/{slot}", epoch, seed),
            )
        )
    return found


@dataclass(frozen=True)
class Pool:
    """The pool holds what the searches have found so far.

    Attributes:
        now_PTD: the embedding of each search.
        past_PTD: what the search in its place ended in before, so that what was unlearned is not forgotten.
        has_past_P: whether there is one.
    """

    now_PTD: Tensor
    past_PTD: Tensor
    has_past_P: Tensor

    @classmethod
    def empty(cls, count: int, tokens: int, width: int) -> Pool:
        """Return the pool before the first epoch."""
        zeros = torch.zeros(count, tokens, width)
        return cls(zeros, zeros.clone(), torch.zeros(count, dtype=torch.bool))

    def begin(self, searches: Sequence[Search], prompts_NTD: Tensor, unrelated_MTD: Tensor, epoch: int) -> Pool:
        """Return the pool with fresh searches at their starting points.

        The results of the searches that they replace are kept.
        """
        now, past, has_past = self.now_PTD.clone(), self.past_PTD.clone(), self.has_past_P.clone()
        for at, search in enumerate(searches):
            if not search.fresh:
                continue
            if epoch > 0:
                past[at], has_past[at] = now[at], True
            prompt, unrelated = prompts_NTD[search.target], unrelated_MTD[search.unrelated]
            now[at] = start_embedding(search.start, prompt, unrelated, search.seed)
        return Pool(now, past, has_past)

    def moved(self, now_PTD: Tensor) -> Pool:
        """Return the pool after an epoch's steps."""
        return Pool(now_PTD, self.past_PTD, self.has_past_P)

    def texts(self, searches: Sequence[Search]) -> tuple[Tensor, list[int]]:
        """Return all embeddings (M, T, D), and the target of each."""
        owners = [search.target for search in searches]
        past = self.has_past_P.nonzero().flatten().tolist()
        return torch.cat([self.now_PTD, self.past_PTD[past]]), owners + [owners[at] for at in past]

    def tensors(self) -> dict[str, Tensor]:
        """Return the pool as tensors for a checkpoint."""
        return {"now": self.now_PTD, "past": self.past_PTD, "has_past": self.has_past_P}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Pool:
        """Return the pool from the tensors of a checkpoint."""
        return cls(tensors["now"], tensors["past"], tensors["has_past"])
