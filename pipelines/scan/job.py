"""This module is the scan.

It answers which prompts make the model reproduce which training images, and where in the image.

    prompts            N input rows -> P distinct prompts (rejects keep their place), fixed in parts
    check_model        the checkpoint denoises, the way it is sampled                    (`sanity.py`)
    count_cut_off      captions that are longer than the model's tokens                  (`captions.py`)
    references         R images -> index, once                                            (`index/job.py`)
    per wave of parts (`waves.py`):
      from_blocks      the parts' rows that no earlier call has written, in blocks        P rows
      Census           sample S generations each, segment, embed, search, classify        P rows, on GPUs or all cores
      write_rows       one row per prompt, evidence only of what is memorised               P rows
      commit           of a part, when all is written: ids in = ids out, each once; counts; rejects
    finish             inputs = done + rejected over all parts, or the run is not complete

One actor does both halves, so that pixels and vectors never travel; `resources.judges` gives the second half actors of
its own (`Sample -> Judge`), for clusters whose CPU nodes should search. The driver reads a wave's captions part by part
and hands out exactly the rows that are left, into Ray's object store; that, and not Ray Data's checkpointing, makes a
resume (`run_folder/runs.py` says how), because it needs no extra actors and gives the same guarantee.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from memscan.config import CensusConfig, PromptsConfig
from memscan.errors import MemscanError
from memscan.index.manifest import MANIFEST_FILE, Manifest
from memscan.inspection import lines, prompt_facts
from memscan.io import storage
from memscan.prompts.table import read_prompts
from memscan.redaction import redact
from pipelines.ray import supervisor
from pipelines.ray.causes import user_error
from pipelines.ray.layout import PoolLayout, actors
from pipelines.ray.logs import run_log
from pipelines.ray.progress import ProgressBar, ProgressDisplay, Reporter, progress_display
from pipelines.ray.session import Machine, logs_folder, ray_session
from pipelines.ray.stage import StageSetup
from pipelines.run_folder.identity import identity
from pipelines.run_folder.inputs import adapter_for, model_ids, pinned, prompt_ids, reference_id
from pipelines.run_folder.lease import hold
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts
from pipelines.scan.captions import count_cut_off, words
from pipelines.scan.events import RunEvents
from pipelines.scan.sanity import check_model
from pipelines.scan.stages import Census, Judge, Sample
from pipelines.scan.waves import Packed, Parts, Target, blocks_of, follow, patience, waves, write_rows

if TYPE_CHECKING:
    import ray.data

    from memscan.sources.reading import Source


def scan(
    config: CensusConfig, say: Callable[[str], None] = lambda text: None, index_version: int | None = None
) -> Counts:
    """Run a census, or the rest of it, into `config.out`.

    Args:
        say: receives a line when the inputs have been found good, before anything heavy starts.
        index_version: of the reference index, for a new run; the one that counts when not given.

    Returns:
        The run's counts.

    Raises:
        MemscanError: wrong inputs, another run in the folder, or rows that do not add up. The run stays resumable.
    """
    content = run_content(config)
    run = Run.prepare(config, content)
    if run.state == "complete":
        say(f"census {config.name}: complete already, in {config.out}")
        return run.progress()
    with hold(run.folder.leases, say, run.epoch) as lease:
        run = Run.open(config, content, lease)  # again: another driver may have worked on it until now
        if run.state == "complete":
            return run.progress()
        facts = adapter_for(config).to_json(config.generator.guidance)
        before = run.manifest["generator"] or {}
        facts["warnings"] += words(before.get("captions"))
        run.set_generator({**facts, **{key: before.get(key) for key in ("sanity", "captions")}})
        return _run(run, config, say, index_version)


def _run(run: Run, config: CensusConfig, say: Callable[[str], None], index_version: int | None) -> Counts:
    """Do the rest of a run whose lease is held."""
    # Prompts keep the names of their files as the configuration writes them; all else is looked for by workers.
    prompts, shown = config.prompts, config.out
    config = run.places.opened(config)
    logs = logs_folder(config.out)
    with run_log(logs, config.name) as log:
        events = RunEvents(run, log, config.name)
        with noted(run, events.stopped):
            source = _references(run, config)
            if not run.manifest["prompts"]:
                for line in _fix_prompts(run, prompts, config.part_size):
                    say(line)
            say(f"census {config.name}: {run.manifest['prompts']['distinct']:,} prompts into {shown}")
            if len(versions := list(run.manifest.get("code_versions") or [])) > 1:
                say(f"code          begun by memscan {versions[0]}, continued by {versions[-1]}")
            for warning in (run.manifest["generator"] or {}).get("warnings", ()):
                say(f"warning       {warning}")
            events.begin()
            with ray_session(logs) as machine, progress_display(logs / "progress.json") as (display, report):
                check_model(run, config, machine, say)
                count_cut_off(run, config, say)
                _index(run, config, source, machine, display, report, index_version)
                _scan(run, config, machine, display, report, events)
            counts = run.finish()
        events.end(counts)
        return counts


def _fix_prompts(run: Run, config: PromptsConfig, part_size: int) -> list[str]:
    """Read the prompts, cut them into parts, and return in words how they were read.

    No prompts are kept in memory afterwards.
    """
    scratch = None if storage.is_remote(run.folder.path) else run.folder.scratch
    if scratch is not None:
        storage.remove_tree(scratch)  # of a driver that was killed while it read
        storage.make_dirs(scratch)
    try:
        table = read_prompts(config, scratch)
        run.write_prompts(table, part_size)
        return lines(prompt_facts(table))
    finally:
        if scratch is not None:
            storage.remove_tree(scratch)


@contextmanager
def noted(run: Run, tell: Callable[[str, str | None], None] = lambda state, error: None) -> Iterator[None]:
    """Record in the run what ends the block early, report it, and raise it.

    If there is a user's mistake inside, that mistake is raised.
    """
    supervisor.tell(run=[run.folder.path, run.epoch])
    try:
        yield
    except KeyboardInterrupt:
        _stop(run, tell, "interrupted")
        raise
    except BaseException as error:
        cause = user_error(error)
        _stop(run, tell, "failed", redact(str(cause or f"{type(error).__name__}: {error}"))[:500])
        if cause is not None and cause is not error:
            raise cause from error
        raise
    finally:
        supervisor.tell(run=None)


def _stop(run: Run, tell: Callable[[str, str | None], None], state: str, error: str | None = None) -> None:
    try:
        tell(state, error)
        run.stop(state, error)
    except (MemscanError, OSError) as second:  # a full disk, as often as not the reason itself: that one is to be told
        logging.getLogger(__name__).info("run.json does not say that the run is %s: %s", state, second)


def open_run(config: CensusConfig) -> Run:
    """Check the inputs and open the run's folder: everything that can be wrong before something heavy starts."""
    return Run.open(config, run_content(config))


def run_content(config: CensusConfig) -> dict[str, str]:
    """Return the run's identity: configuration, models, inputs.

    Raises MemscanError if one of them does not exist.
    """
    adapter_for(config)
    extra = {f"models.{role}": name for role, name in model_ids(config).items()}
    extra |= {f"inputs.{file}": name for file, name in prompt_ids(config).items()}
    extra["inputs.references"] = reference_id(config)
    return identity(config, extra)


def _references(run: Run, config: CensusConfig) -> Source | None:
    """Return the references that are still to be indexed; None if the index is there.

    Raises:
        MemscanError: no index could be made of them, or none that could ever give a verdict. Nothing has begun yet.
    """
    from pipelines.index.building import BuildFolder
    from pipelines.index.job import source_of

    folder = config.index.path or run.folder.index
    BuildFolder(folder).tidy()
    # `reference_id` looked whether there is a source or an index.
    return None if storage.exists(storage.join(folder, MANIFEST_FILE)) else source_of(config, checked=True)


def _index(
    run: Run,
    config: CensusConfig,
    source: Source | None,
    machine: Machine,
    display: ProgressDisplay,
    report: Reporter,
    version: int | None,
) -> None:
    """Find the reference index, or build it; note in the run which one it is."""
    folder = config.index.path or run.folder.index
    if source is not None:
        from pipelines.index.job import build_index

        layout = PoolLayout.of(config, machine, source.rows or len(source.layout.files))
        setup = StageSetup(pinned(config, run.models), layout.device, layout.threads, models=run.models)
        build_index(source, folder, setup, layout, display, report)
    known = run.manifest["index"]
    # A run keeps to the version it began with, whatever was added to the index since.
    run.set_index(folder, Manifest.load(folder, known["version"] if known else version))


def _scan(
    run: Run, config: CensusConfig, machine: Machine, display: ProgressDisplay, report: Reporter, events: RunEvents
) -> None:
    done = {number: counts for number in run.parts if (counts := run.committed(number)) is not None}
    left = [number for number in run.parts if number not in done]
    total = int(run.manifest["prompts"]["distinct"])
    todo = {number: run.todo(number).num_rows for number in left}
    before = total - sum(todo.values())
    layout = PoolLayout.of(config, machine, max(1, sum(todo.values())))
    index = run.manifest["index"]
    setup = StageSetup(
        pinned(config, run.models),
        layout.device,
        layout.threads,
        run.places.open(index["path"]),
        index["version"],
        run.folder.journal(run.epoch),
        models=run.models,
    )
    events.shaped(layout, sum(done.values(), Counts()), len(done))
    if storage.is_dir(run.folder.journals):  # what an earlier driver's workers left says only that they were stopped
        storage.remove_tree(run.folder.journals)
    stages = [ProgressBar(name, "prompts", total, before) for name in ("sample", "judge")]
    with _searching(setup) as setup, display.show(*stages, on_update=events.update):
        for wave in waves(todo, layout.block):
            rows = {number: todo[number] for number in wave}
            parts = Parts(rows, run.left)
            written = partial(
                chain, parts, setup, layout, report, Target(run.folder.census, run.epoch, run.fingerprint)
            )
            events.wave(len(rows), sum(rows.values()))
            follow(written, rows, events.commit, patience(config.resources.watchdog_seconds))
            setup.open_journal().clear()
    if storage.is_dir(run.folder.journals):
        storage.remove_tree(run.folder.journals)


@contextmanager
def _searching(setup: StageSetup) -> Iterator[StageSetup]:
    """Give the setup, with actors for the index's shards if the configuration spreads them over the nodes."""
    if setup.config.resources.search == "resident":
        yield setup
        return
    from pipelines.scan.scatter import shard_actors

    with shard_actors(setup.index, setup.index_version, setup.config.index.nprobe) as shards:
        yield replace(setup, shards=shards)


def chain(parts: Parts, setup: StageSetup, layout: PoolLayout, report: Reporter, target: Target) -> ray.data.Dataset:
    """Return the stages of some parts, lazily: PROMPTS by the number of the part come in, and WRITTEN goes out.

    Args:
        target: where the parts' files go.
    """
    import ray.data

    # Blocks are cut here: rows that come in as one block would all go to one actor.
    blocks: Any = Packed(lambda: blocks_of(parts, layout.block, layout.step, layout.samplers))
    rows = ray.data.from_blocks(blocks)
    common: dict[str, Any] = {"fn_constructor_args": (setup, report), "batch_size": 1, "batch_format": "pyarrow"}
    if layout.judges:
        rows = rows.map_batches(Sample, **common, **actors(layout.samplers, layout.gpus, len(parts)))
        common |= {"fn_constructor_args": (replace(setup, device="cpu"), report), "batch_size": None}
        rows = rows.map_batches(Judge, **common, **actors(layout.judges, parts=len(parts)))
    else:
        rows = rows.map_batches(Census, **common, **actors(layout.samplers, layout.gpus, len(parts)))
    written = {"fn_args": (target, setup.config.name), "batch_size": None, "batch_format": "pyarrow"}
    return rows.map_batches(write_rows, **written, **layout.writer)
