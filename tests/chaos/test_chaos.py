"""The short form of tests/chaos: one chain from index to flagged list, whose worker, node and driver are ended.

The long form is `python -m tests.chaos.run`. Its networks that lose messages are left to it: now and then Ray waits for
one for ever, and a scan is given up and resumed only after its patience, which no suite has.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.reduce.job import reduce_run
from tests.chaos.killer import Fault, Killer, Nodes
from tests.chaos.oracle import differences

STAGES = ("index", "scan", "reduce")
FAULTS = [Fault("worker", "index", 0.0), Fault("node", "scan", 0.0), Fault("driver", "scan", 0.9)]
SECONDS = {"index": 0.0, "scan": 10.0}  # on an idle machine; a driver that is through by then is ended in the reduce


@pytest.mark.ray
@pytest.mark.slow
def test_a_chain_whose_worker_node_and_driver_are_ended(tiny_world: Any, complete_run: Path, tmp_path: Path) -> None:
    reference = tmp_path / "undisturbed"
    shutil.copytree(complete_run, reference / "run")
    shutil.copytree(complete_run / "index", reference / "index")
    reduce_run(str(reference / "run"))
    folder = tmp_path / "disturbed"
    config = tiny_world.config(
        folder / "run", index__path=str(folder / "index"), resources__samplers=2, part_size=6
    ).model_dump(mode="json")
    with Nodes() as nodes:
        outcome = Killer(nodes, folder, {"config": config, "stages": STAGES}, seed=0).run(list(FAULTS), SECONDS)
    assert [kind for kind, _, _ in outcome.struck] == ["worker", "node", "driver"], outcome
    assert outcome.commands >= 2
    assert not differences(reference, folder, STAGES)
