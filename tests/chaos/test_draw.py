"""The killer's plan: by seed, one fault of each kind, in different stages, in their order."""

from __future__ import annotations

import pytest

from tests.chaos.chain import STAGES
from tests.chaos.killer import FURTHER, FURTHER_FROM, KINDS, draw


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_draws_one_fault_of_each_kind(seed: int) -> None:
    faults = draw(seed, STAGES)
    assert faults == draw(seed, STAGES)
    assert sorted(fault.kind for fault in faults) == sorted(KINDS)
    places = [STAGES.index(fault.stage) for fault in faults]
    assert places == sorted(set(places))
    assert all(0 <= fault.share < 1 for fault in faults)


def test_twenty_seeds_reach_every_stage_with_every_kind() -> None:
    drawn = {(fault.kind, fault.stage) for seed in range(20) for fault in draw(seed, STAGES)}
    assert len(drawn) == len(KINDS) * len(STAGES)


def test_the_further_seeds_draw_three_of_the_further_kinds_and_together_all_of_them() -> None:
    seeds = range(FURTHER_FROM, FURTHER_FROM + 20)
    faults = [draw(seed, STAGES) for seed in seeds]
    assert all(len({fault.kind for fault in one}) == len({fault.stage for fault in one}) == 3 for one in faults)
    assert {fault.kind for one in faults for fault in one} == set(FURTHER)
    assert len({(fault.kind, fault.stage) for one in faults for fault in one}) > 15
