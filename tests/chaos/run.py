"""Seeded chaos runs: python -m tests.chaos.run --seeds 20 [--first 0] [--out DIR]

Each run builds an index, scans, reduces and mitigates on a Ray cluster of a head and two nodes, while a worker, a node
and the driver are killed at random points; every other run has a network that loses messages besides. Seeds from 100 on
have a sound network, and stalls, another clock, or the death of a raylet or of the control store (`killer.py`). The
driver's command is given again when it ends with an error, as an operator would. A run is good when it ends complete
with the tables of an undisturbed run (`oracle.py`). Prints a line a run, and as its last line one JSON object; the exit
code is 1 when a run was not good.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.chain import STAGES
from tests.chaos.killer import FURTHER_FROM, NETWORKS, Killer, Nodes, Outcome, draw
from tests.chaos.oracle import differences

PROMPTS = 45
CHUNK_ROWS = 4
SHARD_ROWS = 10
WATCHDOG = 45  # seconds; a block takes one, and some ten on a machine that is busy with other things
NEMO: dict[str, Any] = {
    "method": "nemo_c",
    "scope": "cluster",
    "blocks": ("down_blocks", "mid_block", "up_blocks"),
    "steps": 10,
    "seeds": 3,
    "threshold_prompts": 4,
    "paraphrases": 1,
    "embeddings": 1,
    "extend": 0.9,
}


def settings(world: Any, folder: Path, stages: tuple[str, ...] = STAGES) -> dict[str, Any]:
    """A chain over the tiny world: the prompts it has and `PROMPTS` more, in two parts."""
    folder.mkdir(parents=True, exist_ok=True)
    more = world.folder / "more.txt"
    more.write_text("\n".join(f"a caption with the number {number}" for number in range(PROMPTS)))
    config = world.config(
        folder / "run",
        prompts__paths=[str(world.folder / "prompts.csv"), str(more)],
        index__path=str(folder / "index"),
        index__shard_rows=SHARD_ROWS,
        generator__steps=4,
        resources__samplers=2,
        resources__watchdog_seconds=WATCHDOG,
        part_size=30,
    )
    return {"config": config.model_dump(mode="json"), "stages": stages, "mitigation": NEMO, "chunk_rows": CHUNK_ROWS}


def undisturbed(world: Any, folder: Path, stages: tuple[str, ...] = STAGES) -> Outcome:
    """The run that all others are compared with."""
    with Nodes() as nodes:
        outcome = Killer(nodes, folder, settings(world, folder, stages), 0).run([], {})
    assert not outcome.failed, outcome
    return outcome


def disturbed(world: Any, seed: int, folder: Path, reference: Path, usual: dict[str, float]) -> tuple[Outcome, str]:
    """One run, the network it had; AssertionError names what is not as in the reference."""
    network = list(NETWORKS)[seed % len(NETWORKS)] if seed < FURTHER_FROM else "sound"
    stages = tuple(usual)
    with Nodes(network=network) as nodes:
        killer = Killer(nodes, folder, settings(world, folder, stages), seed)
        outcome = killer.run(draw(seed, stages), usual)
    found = differences(reference, folder, stages)
    assert not found, f"{len(found)} differences: {found[:5]}"
    return outcome, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="keeps world, reference, results and bad runs here; a later call adds to them"
    )
    asked = parser.parse_args()
    from tests.support.tiny_world import TinyWorld, make_world

    out = asked.out or Path(tempfile.mkdtemp(prefix="memscan-chaos-"))
    out.mkdir(parents=True, exist_ok=True)
    known = out / "usual.json"
    if not known.is_file():
        (out / "world").mkdir()
        made = make_world(out / "world")
        usual = undisturbed(made, out / "reference").stages
        known.write_text(json.dumps({"usual": usual, "settings": made.settings}))
    facts = json.loads(known.read_text())
    world, usual = TinyWorld(out / "world", facts["settings"]), facts["usual"]
    print(f"undisturbed {sum(usual.values()):5.0f} s: {_stages(usual)}", flush=True)
    for seed in range(asked.first, asked.first + asked.seeds):
        result = _one(world, seed, out, usual)
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines() if asked.seeds else []
    results = list({one["seed"]: one for one in map(json.loads, lines)}.values())  # of earlier calls as well
    kinds = Counter(f"{kind} in {stage}" for result in results for kind, stage, _ in result["struck"])
    good = sum(result["good"] for result in results)
    summary = {"runs": len(results), "good": good, "faults": dict(sorted(kinds.items())), "results": results}
    print(json.dumps(summary))
    if asked.out is None:
        shutil.rmtree(out, ignore_errors=True)
    sys.exit(good != len(results))


def _one(world: Any, seed: int, out: Path, usual: dict[str, float]) -> dict[str, Any]:
    folder = out / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        outcome, network = disturbed(world, seed, folder, out / "reference", usual)
    except Exception as error:
        print(f"seed {seed:3}  BAD  {type(error).__name__}: {error}", flush=True)
        return {"seed": seed, "good": False, "error": str(error)[:2000], "struck": []}
    shutil.rmtree(folder)
    struck = "; ".join(f"{kind} in {stage} ({what})" for kind, stage, what in outcome.struck)
    told = f"  failed by itself: {outcome.failed}" if outcome.failed else ""
    head = f"seed {seed:3}  good {outcome.seconds:4.0f} s  {network:5}  {outcome.commands} commands"
    print(f"{head}  {struck}{told}", flush=True)
    return {"seed": seed, "good": True, "network": network, **asdict(outcome)}


def _stages(usual: dict[str, float]) -> str:
    return ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in usual.items())


if __name__ == "__main__":
    main()
