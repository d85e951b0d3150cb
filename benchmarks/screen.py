"""Denoiser calls per prompt and wall time: a full scan against the screened one, on 2 % planted prompts.

Both scan the shipped planted world's model at the published protocol: 50 steps, 4 seeds, guidance, so 400 calls a
prompt, counted on the network. The screened scan has an audit and adaptive samples; its threshold comes from another
world (--calibrate-on). The full scan runs on every planted prompt and --sample ordinary ones, and counts for the rest
by what it took there: every prompt takes the same. The screened one runs on everything. Recall is the share of the
prompts flagged by the full scan that the screened one flags.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks._machine import prompt_table
from memscan.census.tally import judge_rows
from memscan.config import CensusConfig, ScreenConfig
from memscan.detection.decide import choose_threshold
from memscan.index.store import write_index
from memscan.models.calls import CallCounter
from memscan.models.generator import Generator
from memscan.planted.captions import ordinary_caption
from memscan.planted.renderer import random_background, random_object
from memscan.planted.world import check_apart, read_truth, world_config
from memscan.records import REFERENCES, REGIONS
from memscan.sources.reading import open_source
from memscan.worker.screen import Screen
from pipelines.index.building import vectors_of
from pipelines.index.encode import Describe
from pipelines.ray.stage import StageSetup
from pipelines.scan.stages import Census


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate-on", required=True, metavar="DIR", help="another planted world")
    parser.add_argument("--planted", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.02, help="of the prompts that are planted")
    parser.add_argument("--sample", type=int, default=30, help="ordinary prompts of the full scan")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--first-samples", type=int, default=2)
    parser.add_argument("--audit", type=float, default=0.02)
    parser.add_argument("--timestep", type=float, default=500.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    check_apart(None, arguments.calibrate_on)
    rule = ScreenConfig(
        threshold=threshold_from(arguments.calibrate_on, arguments.timestep),
        threshold_source="another planted world",
        timestep=arguments.timestep,
        audit_share=arguments.audit,
        first_samples=arguments.first_samples,
    )
    data = world_config().model_dump()
    data["generator"] |= {"steps": arguments.steps, "samples": arguments.samples, "batch_size": 24}
    full, cascade = (CensusConfig.model_validate({**data, "screen": screen}) for screen in (None, rule))
    planted = [row["caption"] for row in read_truth().to_pylist() if row["label"] != "NM"][: arguments.planted]
    ordinary = _ordinary(round(len(planted) / arguments.share) - len(planted))
    with tempfile.TemporaryDirectory() as folder:
        build_index(full, folder)
        certain = run(full, folder, planted)
        rest = run(full, folder, ordinary[: arguments.sample])
        screened = run(cascade, folder, planted + ordinary)
    scale = len(ordinary) / max(1, arguments.sample)
    calls, seconds = (certain[name] + scale * rest[name] for name in ("calls", "seconds"))
    positives = certain["flagged"] | rest["flagged"]
    number = len(planted) + len(ordinary)
    result = {
        "benchmark": "screen",
        "settings": {**vars(arguments), "calibrate_on": "planted world 2", "threshold": rule.threshold},
        "prompts": number,
        "calls_per_prompt": {"full": calls / number, "cascade": screened["calls"] / number},
        "seconds": {"full": seconds, "cascade": screened["seconds"]},
        "decisions": screened["decisions"],
        "flagged": {"full": len(positives), "both": len(positives & screened["flagged"])},
        "recall": len(positives & screened["flagged"]) / max(1, len(positives)),
        "ratio": {"calls": calls / screened["calls"], "wall_time": seconds / screened["seconds"]},
    }
    print(f"{'':10}{'calls per prompt':>16}{'seconds':>12}{'flagged':>10}")
    print(f"{'full':10}{calls / number:16.1f}{seconds:12.0f}{len(positives):10}   (partly extrapolated)")
    print(f"{'cascade':10}{screened['calls'] / number:16.1f}{screened['seconds']:12.0f}{len(screened['flagged']):10}")
    print(json.dumps(result))


def threshold_from(world: str, timestep: float) -> float:
    config, truth = world_config(world), read_truth(world).to_pylist()
    screen = Screen(ScreenConfig(threshold=0.0, timestep=timestep), Generator.load(config.generator))
    scores = screen.scores([row["caption"] for row in truth])
    memorised = [score for score, row in zip(scores, truth, strict=True) if row["label"] != "NM"]
    ordinary = [score for score, row in zip(scores, truth, strict=True) if row["label"] == "NM"]
    return choose_threshold(memorised, ordinary).threshold


def _ordinary(count: int) -> list[str]:
    """Captions of the world's grammar, each once."""
    rng = np.random.default_rng(2026)
    found: dict[str, None] = {}
    while len(found) < count:
        found[ordinary_caption(random_object(rng), random_background(rng), rng)] = None
    return list(found)


def build_index(config: CensusConfig, folder: str) -> None:
    source = open_source(str(config.index.source))
    work = Path(folder) / "described"
    work.mkdir()
    stage = Describe(StageSetup(config, "cpu", 1), source, str(work))
    stage(source.chunks())
    rows = pa.concat_tables([pq.read_table(file) for file in sorted(work.glob("*.parquet"))])
    vectors = {region: vectors_of(rows, region) for region in REGIONS}
    specs = stage.work.embedder.spec, stage.work.segmenter.spec
    write_index(str(Path(folder) / "index"), rows.select(REFERENCES.names).cast(REFERENCES), vectors, "Flat", 1, *specs)


def run(config: CensusConfig, folder: str, captions: list[str]) -> dict[str, Any]:
    """Calls, seconds, flagged prompts, decisions and rows of one worker."""
    table = prompt_table(captions)
    stage = Census(StageSetup(config, "cpu", 1, str(Path(folder) / "index")))
    started = time.perf_counter()
    with CallCounter(stage.work[0].generator.checkpoint.unet) as counter:
        parts = [stage(table.slice(at, 256)) for at in range(0, table.num_rows, 256)]
    seconds = time.perf_counter() - started
    census = pa.concat_tables(parts)
    first = config.screen.first_samples if config.screen else None
    judged = judge_rows(census, config.verdict, config.metric, first_samples=first)
    decisions = {name: census["decision"].to_pylist().count(name) for name in ("census", "audit", "pass")}
    flagged = set(judged.flagged["prompt_id"].to_pylist())
    return {"calls": counter.calls, "seconds": seconds, "flagged": flagged, "decisions": decisions, "census": census}


if __name__ == "__main__":
    main()
