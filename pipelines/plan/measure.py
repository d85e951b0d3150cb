"""Rates from a sample: the census's own stages on its own first prompts, on workers of the kind that will do the work.

As many workers as the machine will have work at the same time, each in a process of its own, because two of them on one
machine are not twice as fast as one. Where stages have pools of their own they are timed one after the other, whatever
stage would hold the other up in a pipeline. What the workers made goes through the writer and the commit of a run.
Where the index is still to be built, one of the first references takes its place, and their rate is noted.
"""

from __future__ import annotations

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
        timed = _stages(setup, layout, workers, prompts)
        written: dict[str, Any] = _written(timed.made, prompts, place)
    return Rates(
        stages=timed.rates,
        startup=ray_seconds + timed.startup,
        device=layout.device,
        sample=prompts.num_rows,
        workers=workers,
        block=layout.block,
        **written,
        **found,
    )


@contextmanager
def _scratch(config: CensusConfig) -> Iterator[tuple[Path, str]]:
    """A folder on this machine, and one in the storage of the run: both go at the end."""
    with tempfile.TemporaryDirectory(prefix="memscan-plan-") as folder:
        local = "://" not in config.out
        place = storage.join(folder, "run") if local else f"{config.out.rstrip('/')}-plan-{secrets.token_hex(4)}"
        try:
            yield Path(folder), place
        finally:
            if not local:
                storage.remove_tree(place)


class Worker:
    """One stage in an actor, with a clock."""

    def __init__(self) -> None:
        self._stage: Any = None

    def load(self, kind: str, setup: StageSetup) -> None:
        """Load a stage. Here and not in the constructor, because Ray keeps the kind of an error that a call raises."""
        from pipelines.scan import stages

        self._stage = getattr(stages, kind)(setup)
        self._stage.work  # noqa: B018  raises what could not be loaded

    def run(self, blocks: Sequence[pa.Table]) -> tuple[list[float], list[pa.Table]]:
        """Seconds and outcome of each block."""
        seconds, made = [], []
        for block in blocks:
            began = time.perf_counter()
            made.append(self._stage(block))
            seconds.append(time.perf_counter() - began)
        return seconds, made

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
        raise InputError("not one of the first references can be indexed", where=where)
    regions = [region for region in REGIONS if good[region].null_count == 0]
    vectors = {region: vectors_of(good, region) for region in regions}
    write_index(folder, good.select(SCHEMA.names).cast(SCHEMA), vectors, "Flat", 1, *specs)


@dataclass(frozen=True)
class Timed:
    """What the workers did.

    Args:
        rates: stage -> prompts a second of one worker at its pace.
        startup: seconds until the slowest kind of worker is at its pace.
        made: CENSUS rows, a table a block.
    """

    rates: dict[str, float]
    startup: float
    made: list[pa.Table]


def _stages(setup: StageSetup, layout: PoolLayout, workers: int, prompts: pa.Table) -> Timed:
    from pipelines.scan.waves import blocks_of

    blocks = blocks_of({0: prompts}, layout.block)
    if not layout.judges:
        rate, startup, made = _timed("Census", setup, workers, layout.gpus, blocks)
        return Timed({"census": rate}, startup, made)
    rate, startup, sampled = _timed("Sample", setup, workers, layout.gpus, blocks)
    judges = max(1, min(layout.judges, MOST_WORKERS, len(blocks) // BLOCKS))
    judge, later, made = _timed("Judge", replace(setup, device="cpu"), judges, 0.0, sampled)
    return Timed({"sample": rate, "judge": judge}, max(startup, later), made)


def _timed(
    kind: str, setup: StageSetup, workers: int, gpus: float, blocks: Sequence[pa.Table]
) -> tuple[float, float, list[pa.Table]]:
    """Rate of one worker, seconds until it is at that pace, and what the workers made."""
    started = time.perf_counter()
    with _working(workers, gpus) as pool:
        _wait([worker.load.remote(kind, setup) for worker in pool])
        loaded = time.perf_counter() - started
        shares = [blocks[at::workers] for at in range(workers)]
        outcomes = _wait([worker.run.remote(share) for worker, share in zip(pool, shares, strict=True)])
    rates, late = [], []
    for share, (seconds, _) in zip(shares, outcomes, strict=True):
        rows = [block.num_rows for block in share]
        rest = sum(rows[1:]) / sum(seconds[1:]) if len(rows) > 1 else rows[0] / seconds[0]
        rates.append(rest)
        late.append(max(0.0, seconds[0] - rows[0] / rest))  # what only a first block pays
    made = [table for _, tables in outcomes for table in tables]
    return statistics.fmean(rates), loaded + statistics.fmean(late), made


def _written(made: Sequence[pa.Table], prompts: pa.Table, place: str) -> dict[str, float]:
    """Rates of writer and commit, and the size of the files, by a run of these rows alone."""
    from pipelines.run_folder.runs import Run, RunFolder
    from pipelines.run_folder.tables import write_table
    from pipelines.scan.waves import write_rows

    run = Run(RunFolder(place), {"fingerprint": ""})
    write_table(run.folder.prompts_part(0), prompts)
    write = _seconds(lambda: [write_rows(table, run.folder.census) for table in made])
    commit = _seconds(lambda: run.commit(0))
    size = sum(storage.file_size(file) for file in run.files(0))
    rows = prompts.num_rows
    return {"write": rows / write, "commit": rows / commit, "bytes_per_prompt": size / rows}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
