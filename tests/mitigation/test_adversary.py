"""Searches under way inside a training: who begins when and from where, and what is kept of them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memscan.errors import MemscanError
from memscan.mitigation.adversary import Pool, schedule
from memscan.mitigation.attack import STARTS
from memscan.mitigation.targets import Target
from memscan.mitigation.units import UnitSet
from pipelines.mitigate.surrogates import Surrogates, counted


def test_published_training_searches_anew_in_every_epoch() -> None:
    epochs = [schedule(3, 1, 1, epoch, 0, 5) for epoch in range(4)]
    assert all(search.fresh for epoch in epochs for search in epoch)
    assert [search.target for search in epochs[0]] == [0, 1, 2]
    assert {epoch[0].start for epoch in epochs} == set(STARTS)


def test_searches_live_their_epochs_and_are_born_apart() -> None:
    epochs = [schedule(4, 2, 3, epoch, 7, 5) for epoch in range(10)]
    assert all(search.fresh for search in epochs[0])
    for slot in range(8):
        births = [number for number, epoch in enumerate(epochs) if epoch[slot].fresh and number > 0]
        assert all(later - earlier == 3 for earlier, later in pairwise(births))
        kinds = [epochs[number][slot].start for number in births]
        assert len(set(kinds)) == len(kinds)  # the next life begins from another kind of start
    assert all(any(search.fresh for search in epoch) for epoch in epochs)
    seeds = [search.seed for epoch in epochs for search in epoch]
    assert len(set(seeds)) == len(seeds)
    assert epochs == [schedule(4, 2, 3, epoch, 7, 5) for epoch in range(10)]
    assert epochs[0] != schedule(4, 2, 3, 0, 8, 5)


def test_pool_keeps_what_a_search_ended_in() -> None:
    prompts, unrelated = torch.ones(2, 3, 4), torch.zeros(5, 3, 4)
    pool = Pool.empty(2, 3, 4)
    first = schedule(2, 1, 2, 0, 0, 5)
    pool = pool.begin(first, prompts, unrelated, 0)
    assert not pool.has_past_P.any()
    pool = pool.moved(pool.now_PTD + 1)
    ended = pool.now_PTD.clone()
    second = schedule(2, 1, 2, 1, 0, 5)
    assert [search.fresh for search in second] == [False, True]
    pool = pool.begin(second, prompts, unrelated, 1)
    assert torch.equal(pool.now_PTD[0], ended[0])  # carried on
    assert torch.equal(pool.past_PTD[1], ended[1])
    texts, owners = pool.texts(second)
    assert owners == [0, 1, 1]
    assert torch.equal(texts[2], ended[1])
    again = Pool.of(pool.tensors())
    assert torch.equal(again.texts(second)[0], texts)


class Scripted(Surrogates):
    """Draws nothing: each way gives as many clean images as the script says."""

    def __init__(self, clean: dict[str, int], surrogates: int = 4) -> None:
        self._script, self.asked = clean, list[str]()
        settings = SimpleNamespace(surrogates=surrogates, seed=0)
        self._job: Any = SimpleNamespace(settings=settings, ordinary=("a", "b", "c"), targets=())
        self._sampler: Any = SimpleNamespace(own=SimpleNamespace(encode=lambda some: torch.zeros(len(some), 2, 3)))

    def _clean(self, target: Any, name: str, units: UnitSet, text_BTD: Any) -> list[Any]:
        way = name.rstrip("0123456789")
        self.asked.append(way)
        return [way] * self._script.get(way, 0)


def test_surrogates_stay_as_near_to_the_prompt_as_they_can() -> None:
    target = Target("0a", "x", "VM", "1", ("r",))
    near = Scripted({"own": 9})
    assert near.of(target) == (["own"] * 4, ["own"] * 4)
    assert near.asked == ["own"]
    some = Scripted({"own": 1, "mixed": 1, "ordinary": 6})
    assert counted(some.of(target)[1]) == {"mixed": 3, "own": 1}
    few = Scripted({"mixed": 1, "ordinary": 6}, surrogates=9)
    assert few.of(target)[1] == ["mixed"] * 3  # what is found is enough: unrelated images are the last resort
    none = Scripted({"ordinary": 2})
    assert none.of(target)[1] == ["ordinary"] * 2
    with pytest.raises(MemscanError, match="every surrogate image is a copy"):
        Scripted({}).of(target)
