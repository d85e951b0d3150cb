"""This module measures rates on a sample.

It runs the stages of the census on its first prompts, on workers of the kind that will do the work.

As many workers as the machine will have work at the same time, each in its own process, because two of them on one
machine are not twice as fast as one. If stages have their own pools, they are timed one after the other, so that no
stage waits for the other as in a pipeline. The workers' results go through the writer and the commit of a run. If the
index is not built yet, an index of some of the first references takes its place, and the rate of encoding them is
noted.
"""

from __future__ import annotations

import math
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memscan.config import CensusConfig
from memscan.errors import InputError, MemscanError
from memscan.io import storage
from pipelines.plan.rates import Rates

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.ray.layout import PoolLayout
    from pipelines.ray.stage import StageSetup

# References that take the place of an index: enough for a search, some seconds to describe.
REFERENCES = 256
# More of them say nothing more of one machine, and the sample would be too small for them.
MOST_WORKERS = 8
# Blocks that a worker is timed on at least, where the sample has so many.
BLOCKS = 3
# Seconds between two lines about how far the sample is.
SPOKEN_EVERY = 10.0


def measure(config: CensusConfig, sample: int, say: Callable[[str], None] = lambda text: None) -> Rates:
    """Time the stages of a census.

    Args:
        sample: prompts, the first ones.
        say: receives a line when the inputs have been found good.

    Raises:
        MemscanError: what the scan itself would raise.
    """
    from memscan.prompts.table import read_prompts
    from pipelines.ray.layout import PoolLayout
    from pipelines.ray.session import ray_session
    from pipelines.ray.stage import StageSetup
    from pipelines.run_folder.inputs import adapter_for, reference_id

    adapter_for(config)
    reference_id(config)
    limit = min(sample, config.prompts.limit or sample)
    prompts = read_prompts(config.prompts.model_copy(update={"limit": limit})).table
    if prompts.num_rows == 0:
        raise InputError("no prompts to time the stages on", where=config.prompts.paths[0])
    say(f"plan: timing {prompts.num_rows:,} prompts")
    started = time.perf_counter()
    with _scratch(config) as (here, place), ray_session(here / "logs") as machine:
        layout = PoolLayout.of(config, machine, max(prompts.num_rows, config.part_size))
        layout = replace(layout, block=min(layout.block, prompts.num_rows))
        workers = max(1, min(layout.samplers, MOST_WORKERS, prompts.num_rows // (BLOCKS * layout.block)))
        setup = StageSetup(config, layout.device, layout.threads)
        ray_seconds = time.perf_counter() - started
        found, setup = _indexed(setup, layout, workers, str(here / "index"))
        timed = _stages(setup, layout, workers, prompts, say)
        written: dict[str, Any] = _written(timed.made, prompts, place)
    return Rates(
        stages=timed.rates,
        startup=ray_seconds + timed.startup,
        device=layout.device,
        sample=prompts.num_rows,
        workers=workers,
        block=layout.block,
        blocks=timed.blocks,
        uncertainty=timed.uncertainty,
        **written,
        **found,
    )


@contextmanager
def _scratch(config: CensusConfig) -> Iterator[tuple[Path, str]]:
    """Make a folder on this machine, and one in the storage of the run; both are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="memscan-plan-") as folder:
        local = not storage.is_remote(config.out)
        place = storage.join(folder, "run") if local else f"{config.out.rstrip('/')}-plan-{secrets.token_hex(4)}"
        try:
            yield Path(folder), place
        finally:
            if not local:
                storage.remove_tree(place)


class Worker:
    """This is one stage in an actor, with a clock."""

    def __init__(self) -> None:
        self._stage: Any = None

    def load(self, kind: str, setup: StageSetup) -> None:
        """Load a stage. Here and not in the constructor, because Ray keeps the kind of an error that a call raises."""
        from pipelines.scan import stages

        self._stage = getattr(stages, kind)(setup)
        self._stage.work  # noqa: B018  raises what could not be loaded

    def run(self, block: pa.Table) -> tuple[float, pa.Table]:
        """Return seconds and outcome of a block."""
        began = time.perf_counter()
        made = self._stage(block)
        return time.perf_counter() - began, made

    def describe(self, setup: StageSetup, source: Any, skip: int, rows: int) -> tuple[float, pa.Table, Any]:
        """Describe some references, from the chunk of that number on: seconds, DESCRIBED, the models."""
        import pyarrow as pa

        from memscan.sources.reading import ChunkReader
        from pipelines.index.encode import Describe

        stage = Describe(setup, source, "")
        specs = stage.work.embedder.spec, stage.work.segmenter.spec
        reader, pieces, began = ChunkReader(source), [], time.perf_counter()
        for chunk in source.chunks().slice(skip).to_pylist():
            for batch in reader.batches(chunk):
                pieces.append(stage.rows(batch.slice(0, rows)))
                rows -= pieces[-1].num_rows
                if rows <= 0:
                    return time.perf_counter() - began, pa.concat_tables(pieces), specs
        return time.perf_counter() - began, pa.concat_tables(pieces), specs


def _pool(count: int, gpus: float = 0.0) -> list[Any]:
    import ray

    from pipelines.ray.layout import ACTOR_CPUS

    kind: Any = ray.remote(num_cpus=ACTOR_CPUS, num_gpus=gpus)(Worker)
    return [kind.remote() for _ in range(count)]


def _wait(calls: Sequence[Any]) -> list[Any]:
    """Results of remote calls; a user's mistake comes as what it was."""
    import ray

    from pipelines.ray.causes import user_error

    try:
        found: list[Any] = ray.get(list(calls))
        return found
    except MemscanError as error:
        raise (user_error(error) or error) from None


@contextmanager
def _working(count: int, gpus: float) -> Iterator[list[Any]]:
    import ray

    pool = _pool(count, gpus)
    try:
        yield pool
    finally:
        for worker in pool:
            ray.kill(worker)


def _indexed(setup: StageSetup, layout: PoolLayout, workers: int, folder: str) -> tuple[dict[str, Any], StageSetup]:
    """What is to be noted of the index, and the setup with one: the census's own, or one of its first references."""
    from memscan.index.manifest import MANIFEST_FILE
    from memscan.sources.reading import open_source

    config = setup.config
    known = config.index.path or storage.join(config.out, "index")
    if storage.exists(storage.join(known, MANIFEST_FILE)):
        return {}, replace(setup, index=known)
    source = open_source(str(config.index.source), copies=config.index.images == "copy")
    chunks = source.chunks().num_rows
    with _working(workers, layout.gpus) as pool:
        calls = [
            worker.describe.remote(setup, source, chunks * at // workers, max(1, REFERENCES // workers))
            for at, worker in enumerate(pool)
        ]
        described = _wait(calls)
    rates = [table.num_rows / seconds for seconds, table, _ in described if table.num_rows]
    _write_index(folder, [table for _, table, _ in described], described[0][2], str(config.index.source))
    return {"index": statistics.fmean(rates), "references": source.rows}, replace(setup, index=folder)


def _write_index(folder: str, described: Sequence[pa.Table], specs: Any, where: str) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    from memscan.index.store import write_index
    from memscan.records import REFERENCES as SCHEMA
    from memscan.records import REGIONS
    from pipelines.index.building import vectors_of

    rows = pa.concat_tables(described)
    good = rows.filter(pc.is_null(rows["reason"]))
    ids = good["reference_id"].to_pylist()
    first = {key: at for at, key in reversed(list(enumerate(ids)))}  # repeats are refused, not planned
    good = good.take(sorted(first.values()))
    if not good.num_rows:
        raise InputError("none of the first references can be indexed", where=where)
    regions = [region for region in REGIONS if good[region].null_count == 0]
    vectors = {region: vectors_of(good, region) for region in regions}
    write_index(folder, good.select(SCHEMA.names).cast(SCHEMA), vectors, "Flat", 1, *specs)


@dataclass(frozen=True)
class Timed:
    """This says what the workers did.

    Args:
        rates: stage -> prompts per second of one worker at its pace.
        startup: seconds until the slowest kind of worker is at its pace.
        made: CENSUS rows, a table per block.
        blocks, uncertainty: as in `Rates`.
    """

    rates: dict[str, float]
    startup: float
    made: list[pa.Table]
    blocks: dict[str, int]
    uncertainty: dict[str, float | None]


Say = Callable[[str], None]


def _stages(setup: StageSetup, layout: PoolLayout, workers: int, prompts: pa.Table, say: Say) -> Timed:
    from pipelines.scan.waves import Parts, blocks_of

    blocks = list(blocks_of(Parts.of({0: prompts}), layout.block))
    if not layout.judges:
        pace, made = _timed("Census", setup, workers, layout.gpus, blocks, say)
        return _timed_stages({"census": pace}, made)
    sampling, sampled = _timed("Sample", setup, workers, layout.gpus, blocks, say)
    judges = max(1, min(layout.judges, MOST_WORKERS, len(blocks) // BLOCKS))
    judging, made = _timed("Judge", replace(setup, device="cpu"), judges, 0.0, sampled, say)
    return _timed_stages({"sample": sampling, "judge": judging}, made)


@dataclass(frozen=True)
class Pace:
    """This is the pace of one worker of a stage: prompts per second, and its uncertainty.

    Args:
        startup: seconds until it is at that pace.
        blocks, uncertainty: as in `Rates`.
    """

    rate: float
    startup: float
    blocks: int
    uncertainty: float | None


def pace_of(shares: Sequence[Sequence[tuple[int, float]]], loaded: float) -> Pace:
    """Return the pace of workers that were timed.

    A worker's first block includes costs that occur only once, so it counts only if there is no other block.

    Args:
        shares: (rows, seconds) of each block, by worker.
        loaded: seconds until the workers' models were loaded.
    """
    rates, late, steady = [], [], []
    for share in shares:
        rest = share[1:] or share
        rate = sum(rows for rows, _ in rest) / sum(seconds for _, seconds in rest)
        rates.append(rate)
        late.append(max(0.0, share[0][1] - share[0][0] / rate))
        steady += [seconds / rows for rows, seconds in rest]
    return Pace(statistics.fmean(rates), loaded + statistics.fmean(late), len(steady), half_width(steady))


def half_width(seconds: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean (Student's t), as a share of the mean.

    It is None for a single value.
    """
    if len(seconds) < 2:
        return None
    from scipy.stats import t

    error = statistics.stdev(seconds) / math.sqrt(len(seconds))
    return float(t.ppf(0.975, len(seconds) - 1) * error / statistics.fmean(seconds))


def _timed_stages(paces: dict[str, Pace], made: list[pa.Table]) -> Timed:
    return Timed(
        {name: pace.rate for name, pace in paces.items()},
        max(pace.startup for pace in paces.values()),
        made,
        {name: pace.blocks for name, pace in paces.items()},
        {name: pace.uncertainty for name, pace in paces.items()},
    )


def _timed(
    kind: str, setup: StageSetup, workers: int, gpus: float, blocks: Sequence[pa.Table], say: Say
) -> tuple[Pace, list[pa.Table]]:
    """Return the pace of one worker, and what the workers made."""
    started = time.perf_counter()
    with _working(workers, gpus) as pool:
        _wait([worker.load.remote(kind, setup) for worker in pool])
        loaded = time.perf_counter() - started
        shares = [blocks[at::workers] for at in range(workers)]
        # An actor does its calls in their order, so each share is worked through as it stands.
        calls = [[worker.run.remote(block) for block in share] for worker, share in zip(pool, shares, strict=True)]
        _watched([call for share in calls for call in share], blocks[0].num_rows, say)
        outcomes = [_wait(share) for share in calls]
    timed = [
        [(block.num_rows, seconds) for block, (seconds, _) in zip(share, outcome, strict=True)]
        for share, outcome in zip(shares, outcomes, strict=True)
    ]
    return pace_of(timed, loaded), [table for outcome in outcomes for _, table in outcome]


def _watched(calls: Sequence[Any], rows: int, say: Say) -> None:
    """Say how far the calls are, every `SPOKEN_EVERY` seconds and not for each of many."""
    import ray

    left, began, spoken = list(calls), time.perf_counter(), time.perf_counter()
    while left:
        done, left = ray.wait(left, timeout=SPOKEN_EVERY)
        now = time.perf_counter()
        if now - spoken >= SPOKEN_EVERY or (done and not left):
            finished = len(calls) - len(left)
            say(f"plan: {finished} of {len(calls)} blocks of {rows} prompts, {now - began:.0f} s")
            spoken = now


def _written(made: Sequence[pa.Table], prompts: pa.Table, place: str) -> dict[str, float]:
    """Rates of writer and commit, and the size of the files, by a run of these rows alone."""
    from pipelines.run_folder.folder import RunFolder
    from pipelines.run_folder.runs import Run
    from pipelines.run_folder.tables import write_table
    from pipelines.scan.waves import Target, write_rows

    run = Run(RunFolder(place), {"fingerprint": ""})
    write_table(run.folder.prompts_part(0), prompts)
    write = _seconds(lambda: [write_rows(table, Target(run.folder.census)) for table in made])
    commit = _seconds(lambda: run.commit(0))
    size = sum(storage.file_size(file) for file in run.files(0))
    rows = prompts.num_rows
    return {"write": rows / write, "commit": rows / commit, "bytes_per_prompt": size / rows}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
