"""This module makes verdicts from census files, in this process or on Ray Data.

    files ──▶ batches of files ──▶ judge: a tally and the flagged rows of each ──▶ add, join
    (some thousands)               (workers; no pixel is read)                     (driver)

A worker returns one row per batch of files, with counts as JSON and flagged rows as Arrow bytes. So the driver's memory
grows with the number of flagged prompts, and not with the number of scanned ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial as bind
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.census.tally import CENSUS_COLUMNS, FILE, BatchVerdicts, Tally, join_flagged, judge_rows
from memscan.config import MetricConfig, VerdictConfig
from memscan.records import FLAGGED
from memscan.report.evidence import leaves_of
from pipelines.ray.session import logs_folder, ray_session
from pipelines.run_folder.results import hashes, read_checked, relative
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import one_line_damage

RAY_FROM = 200_000  # below so many prompts one process is done before Ray has started
_BATCH_ROWS = 8192
_FILES_A_TASK = 64
# Path, path inside the run folder, sha256 where it is known, run folder, the run's fingerprint.
Named = tuple[str, str, str, str, str]
_GENERATION = "generations.list.element."
_PIXELS = tuple(f"{_GENERATION}{name}" for name in ("evidence", "candidates", "localization"))
_CANDIDATES = tuple(f"{_GENERATION}candidates.list.element.{name}" for name in ("reference_id", "label"))


def judge_files(
    run: Run,
    files: Sequence[str],
    rule: VerdictConfig,
    metric: MetricConfig,
    on_ray: bool,
    first_samples: int | None = None,
) -> tuple[Tally, pa.Table]:
    """Return counts over all files, and the flagged list of `records.FLAGGED`, worst first.

    `on_ray` needs a running Ray.
    """
    known = hashes(run)
    named = [(file, relative(run, file), known.get(file, ""), run.folder.path, run.fingerprint) for file in files]
    work = bind(_judge_many, rule=rule, metric=metric, first=first_samples)
    batches = [named[at : at + _FILES_A_TASK] for at in range(0, len(named), _FILES_A_TASK)]
    found = _on_cluster(batches, work) if on_ray else map(work, batches)
    joined = _join(found)
    return joined.tally, joined.flagged


@contextmanager
def session(run: Run, use_ray: bool) -> Iterator[None]:
    """Run Ray inside a `with` block, or do nothing."""
    if not use_ray:
        yield
        return
    with ray_session(logs_folder(run.folder.path)):
        yield


def on_ray(run: Run, use_ray: bool | None) -> bool:
    """Return whether this run has enough rows to start Ray for them."""
    return use_ray if use_ray is not None else int((run.manifest["prompts"] or {}).get("distinct", 0)) >= RAY_FROM


def _judge_many(files: Sequence[Named], rule: VerdictConfig, metric: MetricConfig, first: int | None) -> BatchVerdicts:
    return _join(judge_rows(table, rule, metric, first_samples=first) for table in _tables(files))


def _tables(files: Sequence[Named]) -> Iterator[pa.Table]:
    """Yield rows of census files, some thousand at a time, with their file's name in the column `FILE`.

    A scan's files hold a block each, 16 rows or so, and a call of `judge` costs more than 16 rows. Of candidates only
    ids and labels are decoded, and no pixel; but every byte is compared with what was committed.

    Raises:
        RunError: a file is missing, damaged or of another run.
    """
    held: list[pa.Table] = []
    for path, name, digest, run, fingerprint in files:
        data = read_checked(run, path, digest or None, fingerprint)
        with one_line_damage(path):
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            columns = [one for one in CENSUS_COLUMNS if one != "generations"]
            columns += [*leaves_of(file, "generations.", _PIXELS), *_CANDIDATES]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                rows = pa.Table.from_batches([batch])
                held.append(rows.append_column(FILE, pa.repeat(pa.scalar(name), rows.num_rows)))
                if sum(table.num_rows for table in held) >= _BATCH_ROWS:
                    yield pa.concat_tables(held, promote_options="default")
                    held = []
    if held:
        yield pa.concat_tables(held, promote_options="default")


def _on_cluster(batches: Sequence[Sequence[Named]], work: bind[BatchVerdicts]) -> Iterator[BatchVerdicts]:
    def judged(item: dict[str, Any]) -> dict[str, Any]:
        found = work([tuple(one) for one in json.loads(item["files"])])
        return {"tally": json.dumps(tally_to_json(found.tally)), "flagged": _to_bytes(found.flagged)}

    import ray.data

    names = ray.data.from_items([{"files": json.dumps(batch)} for batch in batches])
    for row in names.map(judged).iter_rows():
        yield BatchVerdicts(tally_from_json(json.loads(row["tally"])), _from_bytes(row["flagged"]))


def tally_to_json(tally: Tally) -> dict[str, Any]:
    """Return a tally as JSON.

    Counters are lists of key and count, and keys of several parts are lists.
    """
    values = {field.name: getattr(tally, field.name) for field in fields(tally)}
    return {name: list(value.items()) if isinstance(value, Counter) else value for name, value in values.items()}


def tally_from_json(data: dict[str, Any]) -> Tally:
    """Return the tally from which `tally_to_json` made this JSON."""

    def counter(pairs: list[Any]) -> Counter[Any]:
        return Counter({tuple(key) if isinstance(key, list) else key: count for key, count in pairs})

    fields: dict[str, Any] = {
        name: counter(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return Tally(**fields)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _from_bytes(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
        return reader.read_all().cast(FLAGGED)


def _join(judgements: Iterable[BatchVerdicts]) -> BatchVerdicts:
    tally, tables = Tally(), []
    for judgement in judgements:
        tally += judgement.tally
        if judgement.flagged.num_rows:
            tables.append(judgement.flagged)
    return BatchVerdicts(tally, join_flagged(tables))
