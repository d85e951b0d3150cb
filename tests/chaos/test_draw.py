"""The killer's plan: by seed, one fault of each kind, in different stages, in their order."""

from __future__ import annotations

import pytest

from tests.chaos.chain import STAGES
from tests.chaos.killer import KINDS, draw


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
