"""This module is a run's folder: manifest, parts, commit records, resume, conservation of rows.

    state/000007.json             what the run is (configuration, identity, fingerprint), its state and its counts; the
                                  highest number counts (`state.py`)
    run.json                      a copy of it: what people read, and the mark of a run
    prompts/part-00000.parquet    records.PROMPTS, rejected rows included; the input is fixed from here on
    census/part-00000/e000001/    records.CENSUS, one row per prompt, below the epoch of the driver that wrote it
    census/_part-00000.json       commit record: written last and once, with counts, names and hashes of the part's
                                  files; a part without one is unfinished
    rejects/part-00000.parquet    records.PROMPTS of the rows that were rejected at reading or later
    index/                        the reference index, if it was built here
    lease/                        who works on it (`lease.py`)
    journal/ logs/                what workers are working on (`journal.py`); Ray's and ours

Every prompt is there exactly once because of four rules, none of which uses a clock.

* Only the files that a part's commit record names count. A commit record is created once, so of two drivers one wins.
* Before that, nothing of the part is deleted. A driver that begins uses those complete files of earlier epochs that
  together hold no prompt twice (`parts.py`), and its workers do the remaining rows, below its own epoch. So what a
  stalled driver or its workers write later is ignored, and removed after the commit.
* A part is committed only if the ids in the files it takes are exactly the ids of its prompts.
* Parts are opened again (`scan/retry.py`, `scan/repair.py`) by one switch of the state that names all of them; each is
  then committed again, under a name of its own.

Every step can be killed or stalled at any point and repeated (`run_folder/test_protocol.py` tries all of them).
All paths go through `memscan.io.storage`, so a folder may be local or s3://.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memscan.config import CensusConfig
from memscan.errors import MemscanError, RunError
from memscan.index.manifest import MANIFEST_FILE, Manifest
from memscan.index.rejects import rejects_of
from memscan.inspection import prompt_facts
from memscan.io import storage
from memscan.prompts.table import PromptTable
from memscan.records import PROMPTS, Status
from pipelines.run_folder.folder import RunFolder
from pipelines.run_folder.identity import code_version, fingerprint, refuse_other_code, with_this_code
from pipelines.run_folder.lease import Lease
from pipelines.run_folder.manifest import damage_of_counts
from pipelines.run_folder.parts import Choice, choose, epoch_of, names_in
from pipelines.run_folder.places import Places, absolute
from pipelines.run_folder.state import (
    FORMAT,
    RESUME,
    now,
    read_state,
    refuse_foreign,
    refuse_other,
    swap_state,
)
from pipelines.run_folder.tables import LABEL_COLUMN, Counts, count_rows, read_table, to_parquet, total_inputs

ROW_COLUMNS = (*PROMPTS.names, LABEL_COLUMN)


class Run:
    """This is one run: its folder and its manifest. `Run.open` (scan) and `Run.load` (everything after) make it."""

    def __init__(self, folder: RunFolder, manifest: dict[str, Any], revision: int = 0) -> None:
        self.folder, self.manifest, self._revision = folder, manifest, revision
        self.places = Places.of(folder.path)
        self.lease: Lease | None = None
        self._taken: dict[int, tuple[str, ...]] = {}  # part -> files of earlier epochs, as `todo` took them
        self._adds_up: bool | None = None

    @classmethod
    def open(cls, config: CensusConfig, content: Mapping[str, str], lease: Lease | None = None) -> Run:
        """Create the run of `config.out`, or resume it; raises as `prepare`.

        Args:
            lease: of the driver; drivers of earlier epochs can change nothing of the state from now on.
        """
        run = cls.prepare(config, content)
        run.lease = lease
        if run.state != "complete":
            run._save(state="running", error=None, config=run.places.kept(config), **with_this_code(run.manifest))
        return run

    @classmethod
    def prepare(cls, config: CensusConfig, content: Mapping[str, str]) -> Run:
        """Do the same as `open`, without writing anything.

        Args:
            content: `identity(...)` of the run that is asked for.

        Raises:
            RunError: the folder holds another run (names what differs), or files that are not a run.
            MemscanError: it is in a store that is fit for inputs only.
        """
        storage.check_exclusive(config.out)
        folder = RunFolder(absolute(config.out))
        run = cls.load(config.out) if storage.exists(folder.manifest) else None
        # Until its prompts are written, a run has nothing that another configuration could spoil.
        if run is not None and run.manifest["prompts"]:
            begun = run.manifest.get("begun_in") or {}  # runs of older versions do not say
            before = Places(begun.get("directory", run.places.directory), begun.get("folder", run.places.folder))
            refuse_other(config.out, before.spelled(run.manifest["identity"]), run.places.spelled(content))
            refuse_other_code(config.out, run.manifest["identity"], content, run.state)
            # What may change between calls (resources, verdict rule, name) follows the caller.
            run.manifest["config"] = run.places.kept(config)
            return run
        if run is None:
            refuse_foreign(config.out)
        return cls(folder, _new_manifest(config, content, Places.of(folder.path)), run._revision if run else 0)

    @classmethod
    def load(cls, path: str) -> Run:
        """Read a run's manifest.

        Raises:
            RunError: there is no run at `path`, or its manifest is damaged or of another format.
        """
        folder = RunFolder(absolute(path))
        manifest, revision = read_state(folder)
        return cls(folder, manifest, revision)

    @property
    def state(self) -> str:
        """This is `running`, `interrupted`, `failed` or `complete` (only if the commit records add up to the prompts).

        Raises RunError if a commit record is damaged.
        """
        state = str(self.manifest["state"])
        if state != "complete":
            return state
        if self._adds_up is None:
            self._adds_up = self._committed_all()
        return state if self._adds_up else "interrupted"

    @property
    def epoch(self) -> int:
        """Of the driver that works on the run; of the last one that did, where this process has no lease."""
        return self.lease.epoch if self.lease else int(self.manifest.get("epoch", 0))

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def parts(self) -> range:
        """These are the numbers of the parts; there are none until the prompts are written."""
        return range(int(self.manifest["prompts"]["parts"]) if self.manifest["prompts"] else 0)

    @property
    def models(self) -> dict[str, str]:
        """These are role -> id of the models with which the run began, as `inputs.model_ids` names them."""
        prefix = "models."
        found = self.manifest["identity"].items()
        return {key.removeprefix(prefix): name for key, name in found if key.startswith(prefix)}

    def config(self) -> CensusConfig:
        """Return the run's configuration with absolute paths, which every process understands."""
        return self.places.opened(CensusConfig.model_validate(self.manifest["config"]))

    @property
    def index(self) -> str:
        """Return the folder of the index of this run: where the scan had it, or in the run folder if that moved."""
        path = self.places.open(str(self.manifest["index"]["path"]))
        return path if storage.exists(storage.join(path, MANIFEST_FILE)) else self.folder.index

    def write_prompts(self, prompts: PromptTable, part_size: int) -> None:
        """Fix the input: cut the prompt table into parts, then name them in the manifest (in this order)."""
        if prompts.num_rows == 0:
            raise RunError("no prompts to scan", where=self.folder.path, hint="the prompt files hold no data rows")
        inputs, rejected, hashes = 0, 0, list[str]()
        for number, table in enumerate(prompts.parts(part_size)):
            hashes.append(self.write_prompts_part(number, table))
            inputs += total_inputs(table)
            rejected += pc.sum(pc.equal(table["status"], Status.REJECTED.value)).as_py()
        if inputs != prompts.rows_read:
            what = f"prompt rows do not add up: {prompts.rows_read} read, {inputs} kept"
            raise RunError(what, where=self.folder.path)
        facts = {
            "rows_read": prompts.rows_read,
            "distinct": prompts.num_rows,
            "rejected_at_reading": rejected,
            "parts": len(hashes),
            "part_size": part_size,
            "sha256": hashes,
            "reading": prompt_facts(prompts),
        }
        self._save(prompts=facts)

    def write_prompts_part(self, number: int, table: pa.Table) -> str:
        """Write a part's prompts; the sha256 of their file. What a driver that was stalled writes there is refused."""
        path, data = self.folder.prompts_part(number), to_parquet(table)
        if not storage.create_new(path, data) and storage.read_bytes(path) != data:
            if self.lease is not None:
                self.lease.check()
            storage.write_atomic(path, data)
        return hashlib.sha256(data).hexdigest()

    def prompts(self, number: int) -> pa.Table:
        """Return rows (PROMPTS) of a part. Raises RunError if their file is damaged or missing."""
        path = self.folder.prompts_part(number)
        known = (self.manifest.get("prompts") or {}).get("sha256")
        hint = "`memscan repair-run` makes it again from the prompt files"
        if not storage.exists(path):
            raise RunError(f"part {number}: its prompts are missing", where=path, hint=hint)
        if known and storage.sha256_file(path) != known[number]:
            raise RunError(f"part {number}: its prompts are damaged", where=path, hint=hint)
        return read_table(path)

    def set_generator(self, facts: Mapping[str, Any]) -> None:
        """Record what samples this run, and which signals its model cannot have (`adapters.Adapter.to_json`)."""
        self._save(generator=dict(facts))

    def set_index(self, path: str, index: Manifest) -> None:
        """Record which index judges this run. Raises RunError if an earlier call used other bytes."""
        known = self.manifest["index"]
        if known and known["hash"] != index.hash:
            change = f"{known['hash']} -> {index.hash}"
            raise RunError(
                f"the reference index changed since the run began ({change})",
                where=path,
                hint="restore the index, or scan into a new folder",
            )
        facts = {"path": self.places.keep(path), "hash": index.hash, "version": index.version, "count": index.count}
        self._save(
            index={**facts, "rejects": rejects_of(path, index)},
            # The full specifications, with preprocessing, as the index was built by them.
            models={**self.manifest["models"], "embedder": index.embedder, "segmenter": index.segmenter},
            fingerprint=fingerprint({**self.manifest["identity"], "index.hash": index.hash}),
        )

    def opened(self, number: int) -> int:
        """Return the epoch in which a part was opened again; 0 if it never was."""
        return int(self.manifest.get("reopened", {}).get(str(number), 0))

    def commit_path(self, number: int) -> str:
        """Return where a part's commit record is, or will be."""
        return self.folder.commit_record(number, self.opened(number))

    def commit_record(self, number: int) -> dict[str, Any] | None:
        """Return what was recorded at a part's commit, or None. Raises RunError if that is damaged."""
        path = self.commit_path(number)
        if not storage.exists(path):
            return None
        try:
            record = storage.read_json(path)
            damaged = damage_of_counts(record["counts"])
            if not damaged and not all(isinstance(n, str) and storage.is_inner(n) for n in record["files"]):
                damaged = "files: not names of files"
        except (MemscanError, KeyError, TypeError) as error:
            damaged = error.what if isinstance(error, MemscanError) else "no counts or no files"
        if damaged:
            raise RunError(
                f"part {number}: the commit record is damaged ({damaged})",
                where=path,
                hint="`memscan repair-run` makes it again: rows are kept",
            )
        found: dict[str, Any] = record
        return found

    def committed(self, number: int) -> Counts | None:
        """Return the counts of a committed part, or None. Raises RunError as `commit_record` does."""
        record = self.commit_record(number)
        return None if record is None else Counts.from_json(record["counts"])

    def todo(self, number: int) -> pa.Table:
        """Return rows (PROMPTS) of a part that are in no file that counts.

        Deletes nothing: another driver may be about to commit what this one does not take.
        """
        prompts = self.prompts(number)
        choice = self._choose(number, prompts, self.candidates(number), ["prompt_id"])
        self._taken[number] = tuple(choice.names)
        return choice.rest_of(prompts)

    def left(self, number: int) -> pa.Table:
        """What the last `todo` of a part gave, read again: files that came since, of stalled workers, do not count."""
        return self._choose(number, rows := self.prompts(number), self._taken[number], ["prompt_id"]).rest_of(rows)

    def commit(self, number: int) -> Counts:
        """Check that a part's rows are its prompts, each once; create its commit record, then write its rejects.

        Gives the counts of the record that is there, which is another driver's where that one was first.

        Raises:
            RunError: rows are missing, or the lease is lost: the part is not committed.
        """
        prompts, folder = self.prompts(number), self.folder.census_part(number)
        taken = self._taken.get(number)
        names = names_in(folder)
        if taken is None:
            allowed = self.candidates(number)
        else:
            allowed = [*taken, *(name for name in names if epoch_of(name) == self.epoch or self.lease is None)]
        choice = self._choose(number, prompts, allowed, ROW_COLUMNS)
        if missing := prompts.num_rows - len(choice.ids):
            raise RunError(
                f"part {number}: {missing} of {prompts.num_rows} prompts are missing"
                + "".join(f"; {name} {why}" for name, why in list(choice.ignored.items())[:1]),
                where=self.folder.path,
                hint=RESUME,
            )
        rows = pa.concat_tables([file.table for file in choice.files])
        if self.lease is not None:
            self.lease.check()
        record = {
            "part": number,
            "counts": count_rows(rows).to_json(),
            "files": choice.names,
            "sha256": {file.name: file.sha256 for file in choice.files},
            "epoch": self.epoch,
            "fingerprint": self.fingerprint,
            "committed": now(),
        }
        path, data = self.commit_path(number), json.dumps(record, indent=2).encode() + b"\n"
        if not storage.create_new(path, data) and storage.read_bytes(path) != data:
            counts = self.committed(number)
            assert counts is not None  # records are never taken away
            return counts
        self._write_rejects(number, rows)
        self.sweep(number, [name for name in names if name not in set(choice.names)])
        return count_rows(rows)

    def sweep(self, number: int, names: Iterable[str]) -> list[str]:
        """Remove files that a committed part does not name, up to this driver's epoch; the names of those removed."""
        allowed = [name for name in names if self.lease is None or epoch_of(name) <= self.lease.epoch]
        for name in allowed:
            storage.remove_tree(storage.join(self.folder.census_part(number), name))
        return allowed

    def reopen(self, kept: Mapping[int, Sequence[str]]) -> None:
        """Open committed parts again, all in one switch of the state; a scan does the rows that are missing then.

        Args:
            kept: part -> files that stay, by their names below its folder; new ones lie below this driver's epoch.
        """
        for number, names in kept.items():
            storage.write_json(self.folder.opening_record(number, self.epoch), {"part": number, "keep": list(names)})
        opened = {**self.manifest.get("reopened", {}), **{str(number): self.epoch for number in kept}}
        self._save(state="interrupted", counts=None, completed=None, error=None, reopened=opened)

    def finish(self) -> Counts:
        """Sum the parts, check conservation against the prompts, and only then call the run complete."""
        total = Counts()
        for number in self.parts:
            counts = self.committed(number)
            if counts is None:
                raise RunError(f"part {number} is not committed", where=self.folder.path, hint=RESUME)
            total += counts
            if counts.rejected and not storage.exists(self.folder.rejects_part(number, self.opened(number))):
                rows = [read_table(file, list(ROW_COLUMNS)) for file in self.files(number)]
                self._write_rejects(number, pa.concat_tables(rows))  # a kill came between it and the commit
        prompts = self.manifest["prompts"]
        if not self._conserved(total):
            raise RunError(
                f"rows do not add up: {prompts['rows_read']} inputs and {prompts['distinct']} prompts, "
                f"but {total.inputs} inputs, {total.done} done and {total.rejected} rejected in the parts",
                where=self.folder.path,
            )
        if self.lease is not None and self.lease.epoch > 1:  # an earlier driver may have left something since
            for number in self.parts:
                named = set(self.committed_files(number))
                self.sweep(number, [name for name in names_in(self.folder.census_part(number)) if name not in named])
        self._save(state="complete", counts=total.to_json(), completed=now())
        return total

    def stop(self, state: str, error: str | None = None) -> None:
        """Record that the run ended early (`interrupted` or `failed`); the same command resumes it."""
        self._save(state=state, error=error)

    def progress(self) -> Counts:
        """Sum of the parts committed so far."""
        return sum((counts for number in self.parts if (counts := self.committed(number))), Counts())

    def committed_files(self, number: int) -> list[str]:
        """Return names, below the part's folder, of a committed part's files; empty if it is not committed."""
        record = self.commit_record(number)
        return list(record["files"]) if record else []

    def files(self, number: int) -> list[str]:
        """Parquet files of a part: those of its commit record, or all that are there while it has none."""
        folder, record = self.folder.census_part(number), self.commit_record(number)
        return [storage.join(folder, name) for name in (record["files"] if record else names_in(folder))]

    def whole_files(self, number: int) -> list[str]:
        """Return the names of an uncommitted part's files that a resume would take."""
        return self._choose(number, self.prompts(number), self.candidates(number), ["prompt_id"]).names

    def _write_rejects(self, number: int, rows: pa.Table) -> None:
        opened, rejects = self.opened(number), rows.filter(pc.equal(rows["status"], Status.REJECTED.value))
        if opened:
            storage.remove_tree(self.folder.rejects_part(number))
        if rejects.num_rows:
            table = rejects.select(PROMPTS.names).cast(PROMPTS)
            storage.write_atomic(self.folder.rejects_part(number, opened), to_parquet(table))

    def candidates(self, number: int) -> list[str]:
        """Return files that may belong to a part: none of a later driver, none of before the part was opened again."""
        opened, last = self.opened(number), self.lease.epoch if self.lease else math.inf
        kept = storage.read_json(self.folder.opening_record(number, opened))["keep"] if opened else []
        names = names_in(self.folder.census_part(number))
        return [*kept, *(name for name in names if opened <= epoch_of(name) <= last)]

    def _choose(self, number: int, prompts: pa.Table, names: Iterable[str], columns: Sequence[str]) -> Choice:
        wanted = frozenset(prompts["prompt_id"].to_pylist())
        return choose(self.folder.census_part(number), dict.fromkeys(names), wanted, self.fingerprint, columns)

    def _committed_all(self) -> bool:
        counts = [self.committed(number) for number in self.parts]
        return None not in counts and self._conserved(sum((one for one in counts if one), Counts()))

    def _conserved(self, total: Counts) -> bool:
        prompts = self.manifest["prompts"] or {"distinct": 0, "rows_read": 0}
        return bool(
            total.rows == prompts["distinct"]
            and total.inputs == prompts["rows_read"]
            and total.done + total.rejected == total.rows
        )

    def _save(self, **changes: Any) -> None:
        self.manifest, self._revision = swap_state(self.folder, self.manifest, self._revision, changes, self.lease)
        self._adds_up = None


def _new_manifest(config: CensusConfig, content: Mapping[str, str], places: Places) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": config.name,
        "state": "running",
        "error": None,
        "created": now(),
        "code_version": code_version(),
        "fingerprint": fingerprint(content),
        "config_fingerprint": config.fingerprint(),
        "models": {key.removeprefix("models."): value for key, value in content.items() if key.startswith("models.")},
        "generator": None,
        "index": None,
        "prompts": None,
        "counts": None,
        "identity": dict(content),
        "config": places.kept(config),
        "begun_in": {"directory": places.directory, "folder": places.folder},
    }
