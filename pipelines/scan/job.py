"""The census: which prompts make the model reproduce which training images, and where in the image.

    prompts            N input rows -> P distinct prompts (rejects keep their place), fixed in parts
    check_model        the checkpoint denoises, the way it is sampled                    (`sanity.py`)
    count_cut_off      captions that are longer than the model's tokens                  (`captions.py`)
    references         R images -> index, once                                            (`index/job.py`)
    per wave of parts (`waves.py`):
      from_blocks      the parts' rows that no earlier call has written, in blocks        P rows
      Census           sample S generations each, segment, embed, search, classify        P rows, on GPUs or all cores
      write_rows       one row a prompt, evidence only of what is memorised               P rows
      commit           of a part, when all is written: ids in = ids out, each once; counts; rejects
    finish             inputs = done + rejected over all parts, or the run is not complete

One actor does both halves, so that pixels and vectors never travel; `resources.judges` gives the second half actors of
its own (`Sample -> Judge`), for clusters whose CPU nodes should search. A wave's captions are some megabytes, so the
driver reads them and hands out exactly the rows that are left; that, and not Ray Data's checkpointing, makes a resume
(`run_folder/runs.py` says how), because it needs no extra actors and gives the same guarantee.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from memscan.inspection import lines, prompt_facts
from memscan.io import storage
from memscan.prompts.table import read_prompts
from memscan.redaction import redact
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
from pipelines.scan.waves import Target, blocks_of, follow, packed, patience, waves, write_rows

if TYPE_CHECKING:
    import ray.data


def scan(
    config: CensusConfig, say: Callable[[str], None] = lambda text: None, index_version: int | None = None
) -> Counts:
    """Run a census, or what is left of it, into `config.out`.

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
    """All that is left of a run whose lease is held."""
    # Prompts keep the names of their files as the configuration writes them; all else is looked for by workers.
    prompts, shown = config.prompts, config.out
    config = run.places.opened(config)
    logs = logs_folder(config.out)
    with run_log(logs, config.name) as log:
        events = RunEvents(run, log, config.name)
        with noted(run, events.stopped):
            if not run.manifest["prompts"]:
                table = read_prompts(prompts)
                run.write_prompts(table, config.part_size)
                for line in lines(prompt_facts(table)):
                    say(line)
            say(f"census {config.name}: {run.manifest['prompts']['distinct']:,} prompts into {shown}")
            for warning in (run.manifest["generator"] or {}).get("warnings", ()):
                say(f"warning       {warning}")
            events.begin()
            with ray_session(logs) as machine, progress_display(logs / "progress.json") as (display, report):
                check_model(run, config, machine, say)
                count_cut_off(run, config, say)
                _index(run, config, machine, display, report, index_version)
                _scan(run, config, machine, display, report, events)
            counts = run.finish()
        events.end(counts)
        return counts


@contextmanager
def noted(run: Run, tell: Callable[[str, str | None], None] = lambda state, error: None) -> Iterator[None]:
    """What ends the block early is noted in the run, told, and raised as the user's mistake where it is one inside."""
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
    """The run's identity: configuration, models, inputs. Raises MemscanError where one of them is not there."""
    adapter_for(config)
    extra = {f"models.{role}": name for role, name in model_ids(config).items()}
    extra |= {f"inputs.{file}": name for file, name in prompt_ids(config).items()}
    extra["inputs.references"] = reference_id(config)
    return identity(config, extra)


def _index(
    run: Run, config: CensusConfig, machine: Machine, display: ProgressDisplay, report: Reporter, version: int | None
) -> None:
    """Find the reference index, or build it; note in the run which one it is."""
    from memscan.index.manifest import MANIFEST_FILE, Manifest
    from pipelines.index.building import BuildFolder
    from pipelines.index.job import build_index, source_of

    folder = config.index.path or run.folder.index
    BuildFolder(folder).tidy()
    if not storage.exists(storage.join(folder, MANIFEST_FILE)):
        assert config.index.source is not None  # `reference_id` looked
        source = source_of(config, checked=True)
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
            parts = {number: run.todo(number) for number in wave}
            written = partial(
                chain, parts, setup, layout, report, Target(run.folder.census, run.epoch, run.fingerprint)
            )
            rows = {number: table.num_rows for number, table in parts.items()}
            events.wave(len(rows), sum(rows.values()))
            follow(written, rows, events.commit, patience(config.resources.watchdog_seconds))
            setup.open_journal().clear()
    if storage.is_dir(run.folder.journals):
        storage.remove_tree(run.folder.journals)


@contextmanager
def _searching(setup: StageSetup) -> Iterator[StageSetup]:
    """The setup with actors for the index's shards, where the configuration spreads them over the nodes."""
    if setup.config.resources.search == "resident":
        yield setup
        return
    from pipelines.scan.scatter import shard_actors

    with shard_actors(setup.index, setup.index_version, setup.config.index.nprobe) as shards:
        yield replace(setup, shards=shards)


def chain(
    parts: Mapping[int, pa.Table], setup: StageSetup, layout: PoolLayout, report: Reporter, target: Target
) -> ray.data.Dataset:
    """The stages of some parts, lazily: PROMPTS by the number of the part in, WRITTEN out.

    Args:
        target: where the parts' files go.
    """
    import ray.data

    # Blocks are cut here: rows that come in as one block would all go to one actor.
    blocks = blocks_of(parts, layout.block, layout.step, layout.samplers)
    rows = ray.data.from_blocks(packed(blocks))
    common: dict[str, Any] = {"fn_constructor_args": (setup, report), "batch_size": 1, "batch_format": "pyarrow"}
    if layout.judges:
        rows = rows.map_batches(Sample, **common, **actors(layout.samplers, layout.gpus, len(parts)))
        common |= {"fn_constructor_args": (replace(setup, device="cpu"), report), "batch_size": None}
        rows = rows.map_batches(Judge, **common, **actors(layout.judges, parts=len(parts)))
    else:
        rows = rows.map_batches(Census, **common, **actors(layout.samplers, layout.gpus, len(parts)))
    written = {"fn_args": (target, setup.config.name), "batch_size": None, "batch_format": "pyarrow"}
    return rows.map_batches(write_rows, **written, **layout.writer)
