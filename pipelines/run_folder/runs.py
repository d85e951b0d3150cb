"""A run's folder: manifest, parts, commit records, resume, conservation of rows.

    run.json                      what the run is (configuration, identity, fingerprint), its state and its counts
    prompts/part-00000.parquet    records.PROMPTS, rejected rows included; the input is fixed from here on
    census/part-00000/*.parquet   records.CENSUS, one row a prompt
    census/part-00000.json        commit record: written last, with counts; a part without one is unfinished
    rejects/part-00000.parquet    records.PROMPTS of the rows that were rejected at reading or later
    index/                        the reference index, if it was built here
    lease/                        who works on it (`lease.py`)
    journal/                      what workers are at, while they are (`journal.py`)
    logs/                         Ray's and ours

Exactly once by three rules. A committed part is never run again. In an uncommitted part, rows that already stand in a
readable Parquet file are not run again; a file that a killed writer left without its footer is deleted, and its rows
run again. A part is committed only if the ids in its files are exactly the ids of its prompts, each once. Every step
can be killed at any point and repeated. All paths go through `memscan.io.storage`, so a folder may be local or s3://.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memscan.config import CensusConfig
from memscan.errors import InputError, RunError
from memscan.index.manifest import MANIFEST_FILE, Manifest
from memscan.index.rejects import rejects_of
from memscan.io import storage
from memscan.prompts.table import PromptTable
from memscan.records import PROMPTS, SCHEMA_VERSION, Status
from pipelines.run_folder.lease import Lease
from pipelines.run_folder.manifest import damage, damage_of_counts
from pipelines.run_folder.places import Places, absolute
from pipelines.run_folder.tables import (
    LABEL_COLUMN,
    Counts,
    count_rows,
    ids_or_none,
    read_table,
    total_inputs,
    write_table,
)

FORMAT = 1
RESUME = "run the same command to resume"


@dataclass(frozen=True)
class RunFolder:
    """The names inside a run folder."""

    path: str

    @property
    def manifest(self) -> str:
        return storage.join(self.path, "run.json")

    @property
    def index(self) -> str:
        return storage.join(self.path, "index")

    @property
    def leases(self) -> str:
        return storage.join(self.path, "lease")

    @property
    def journal(self) -> str:
        return storage.join(self.path, "journal")

    @property
    def census(self) -> str:
        return storage.join(self.path, "census")

    def prompts_part(self, number: int) -> str:
        return storage.join(self.path, "prompts", f"part-{number:05d}.parquet")

    def census_part(self, number: int) -> str:
        return storage.join(self.path, "census", f"part-{number:05d}")

    def commit_record(self, number: int) -> str:
        return storage.join(self.path, "census", f"_part-{number:05d}.json")

    def rejects_part(self, number: int) -> str:
        return storage.join(self.path, "rejects", f"part-{number:05d}.parquet")


def identity(config: CensusConfig, extra: Mapping[str, str]) -> dict[str, str]:
    """Everything that decides a run's results, flat: configuration keys, and `extra` (models, inputs), to JSON values.

    Left out is what `CensusConfig.fingerprint` leaves out: name, place, resources, the reduce's rules.
    """
    flat = dict(_flatten(config.content()))
    return {**flat, **extra, "code.version": code_version(), "code.schema": str(SCHEMA_VERSION)}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True)


def code_version() -> str:
    """Version of the installed package, or of the checkout."""
    import memscan

    return str(getattr(memscan, "__version__", "0"))


def fingerprint(content: Mapping[str, str]) -> str:
    """16 hex digits that name a run's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """One run: its folder and its manifest. Made by `Run.open` (scan) or `Run.load` (everything after)."""

    def __init__(self, folder: RunFolder, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.places = Places.of(folder.path)
        self.lease: Lease | None = None

    @classmethod
    def open(cls, config: CensusConfig, content: Mapping[str, str]) -> Run:
        """Create the run of `config.out`, or resume it; raises as `prepare`."""
        run = cls.prepare(config, content)
        if run.state != "complete":
            run._save(state="running", error=None)
        return run

    @classmethod
    def prepare(cls, config: CensusConfig, content: Mapping[str, str]) -> Run:
        """As `open`, without writing anything.

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
            run._refuse_other(content)
            # What may change between calls (resources, verdict rule, name) follows the caller.
            run.manifest["config"] = run.places.kept(config)
        else:
            if run is None:
                _refuse_foreign(config.out)
            run = cls(folder, _new_manifest(config, content, Places.of(folder.path)))
        return run

    @classmethod
    def load(cls, path: str) -> Run:
        """Read a run's manifest.

        Raises:
            RunError: there is no run at `path`, or its manifest is damaged or of another format.
        """
        folder = RunFolder(absolute(path))
        if not storage.exists(folder.manifest):
            raise RunError("not a run folder (no run.json)", where=path, hint="give the folder that memscan scan wrote")
        try:
            manifest = storage.read_json(folder.manifest)
        except InputError as error:
            raise RunError(f"run.json {error.what}", where=path) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise RunError(f"run.json is not of format {FORMAT}", where=path, hint="use the version that wrote it")
        if damaged := damage(manifest):
            raise RunError(f"run.json is damaged ({damaged})", where=path, hint="restore it, or scan into a new folder")
        return cls(folder, manifest)

    @property
    def state(self) -> str:
        return str(self.manifest["state"])

    @property
    def parts(self) -> range:
        """Numbers of the parts; empty until the prompts are written."""
        return range(int(self.manifest["prompts"]["parts"]) if self.manifest["prompts"] else 0)

    @property
    def models(self) -> dict[str, str]:
        """Role -> id of the models that the run began with, as `inputs.model_ids` names them."""
        prefix = "models."
        found = self.manifest["identity"].items()
        return {key.removeprefix(prefix): name for key, name in found if key.startswith(prefix)}

    def config(self) -> CensusConfig:
        """The run's configuration with absolute paths, which every process understands."""
        return self.places.opened(CensusConfig.model_validate(self.manifest["config"]))

    @property
    def index(self) -> str:
        """Folder of the index that judged this run: where the scan had it, or in the run folder if that moved."""
        path = self.places.open(str(self.manifest["index"]["path"]))
        return path if storage.exists(storage.join(path, MANIFEST_FILE)) else self.folder.index

    def write_prompts(self, prompts: PromptTable, part_size: int) -> None:
        """Fix the input: cut the prompt table into parts, then name them in the manifest (in this order)."""
        table = prompts.table
        if table.num_rows == 0:
            raise RunError("no prompts to scan", where=self.folder.path, hint="the prompt files hold no data rows")
        inputs = total_inputs(table)
        if inputs != prompts.rows_read:
            raise RunError(
                f"prompt rows do not add up: {prompts.rows_read} read, {inputs} kept", where=self.folder.path
            )
        parts = -(-table.num_rows // part_size)
        for number in range(parts):
            write_table(self.folder.prompts_part(number), table.slice(number * part_size, part_size))
        rejected = pc.sum(pc.equal(table["status"], Status.REJECTED.value)).as_py()
        self.manifest["prompts"] = {
            "rows_read": prompts.rows_read,
            "distinct": table.num_rows,
            "rejected_at_reading": rejected,
            "parts": parts,
            "part_size": part_size,
        }
        self._save()

    def set_generator(self, facts: Mapping[str, Any]) -> None:
        """Record what samples this run, and which signals its model cannot have (`adapters.Adapter.to_json`)."""
        self.manifest["generator"] = dict(facts)
        self._save()

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
        facts |= {"rejects": rejects_of(path, index)}
        self.manifest["index"] = facts
        # The full specifications, with preprocessing, as the index was built by them.
        self.manifest["models"] |= {"embedder": index.embedder, "segmenter": index.segmenter}
        self.manifest["fingerprint"] = fingerprint({**self.manifest["identity"], "index.hash": index.hash})
        self._save()

    def commit_record(self, number: int) -> dict[str, Any] | None:
        """What was noted when a part was committed, or None. Raises RunError where that is damaged."""
        path = self.folder.commit_record(number)
        if not storage.exists(path):
            return None
        record = storage.read_json(path)
        counts = record.get("counts") if isinstance(record, dict) else None
        if damaged := damage_of_counts(counts):
            raise RunError(
                f"the commit record is damaged ({damaged})", where=path, hint="remove it and scan again: rows are kept"
            )
        found: dict[str, Any] = record
        return found

    def committed(self, number: int) -> Counts | None:
        """Counts of a committed part, or None. Raises RunError as `commit_record`."""
        record = self.commit_record(number)
        return None if record is None else Counts.from_json(record["counts"])

    def todo(self, number: int) -> pa.Table:
        """Rows (PROMPTS) of a part that stand in no readable file yet; removes what killed writers left."""
        prompts = read_table(self.folder.prompts_part(number))
        done: set[str] = set()
        for file in self.files(number):
            ids = ids_or_none(file)
            # A file whose rows all stand elsewhere comes from a writer that outlived its driver.
            if ids is None or ids <= done:
                storage.remove_tree(file)
            else:
                done |= ids
        if not done:
            return prompts
        return prompts.filter(pc.invert(pc.is_in(prompts["prompt_id"], pa.array(sorted(done), pa.string()))))

    def commit(self, number: int) -> Counts:
        """Check that a part's rows are its prompts, each once; write its rejects and then its commit record.

        Raises:
            RunError: rows are missing, doubled or foreign: the part is not committed.
        """
        prompts = read_table(self.folder.prompts_part(number))
        files = self.files(number)
        rows = pa.concat_tables([read_table(file, [*PROMPTS.names, LABEL_COLUMN]) for file in files])
        self._check_ids(number, prompts, rows)
        if self.lease is not None:
            self.lease.check()
        counts = count_rows(rows)
        rejects = rows.filter(pc.equal(rows["status"], Status.REJECTED.value)).select(PROMPTS.names)
        if rejects.num_rows:
            write_table(self.folder.rejects_part(number), rejects.cast(PROMPTS))
        record = {
            "part": number,
            "counts": counts.to_json(),
            "files": [file.rsplit("/", 1)[-1] for file in files],
            "fingerprint": self.manifest["fingerprint"],
            "committed": _now(),
        }
        storage.write_json(self.folder.commit_record(number), record)
        return counts

    def uncommit(self, number: int) -> None:
        """Take back a part's commit: some of its rows are to be done again."""
        storage.remove_tree(self.folder.commit_record(number))
        storage.remove_tree(self.folder.rejects_part(number))

    def reopen(self) -> None:
        """A complete run that has uncommitted parts is running again."""
        self._save(state="running", counts=None, completed=None, error=None)

    def finish(self) -> Counts:
        """Sum the parts, check conservation against the prompts, and only then call the run complete."""
        total = Counts()
        for number in self.parts:
            counts = self.committed(number)
            if counts is None:
                raise RunError(f"part {number} is not committed", where=self.folder.path, hint=RESUME)
            total += counts
        prompts = self.manifest["prompts"]
        conserved = (
            total.rows == prompts["distinct"]
            and total.inputs == prompts["rows_read"]
            and total.done + total.rejected == total.rows
        )
        if not conserved:
            raise RunError(
                f"rows do not add up: {prompts['rows_read']} inputs and {prompts['distinct']} prompts, "
                f"but {total.inputs} inputs, {total.done} done and {total.rejected} rejected in the parts",
                where=self.folder.path,
            )
        self._save(state="complete", counts=total.to_json(), completed=_now())
        return total

    def stop(self, state: str, error: str | None = None) -> None:
        """Record that the run ended early (`interrupted` or `failed`); the same command resumes it."""
        self._save(state=state, error=error)

    def progress(self) -> Counts:
        """Sum of the parts committed so far."""
        return sum((counts for number in self.parts if (counts := self.committed(number))), Counts())

    def files(self, number: int) -> list[str]:
        """Parquet files of a part."""
        folder = self.folder.census_part(number)
        return storage.list_files(folder, (".parquet",)) if storage.is_dir(folder) else []

    def _check_ids(self, number: int, prompts: pa.Table, rows: pa.Table) -> None:
        wanted, got = Counter(prompts["prompt_id"].to_pylist()), Counter(rows["prompt_id"].to_pylist())
        missing, surplus = (wanted - got).total(), (got - wanted).total()
        if missing or surplus:
            raise RunError(
                f"part {number}: {missing} of {prompts.num_rows} prompts are missing and {surplus} rows are surplus",
                where=self.folder.path,
                hint=RESUME,
            )

    def _refuse_other(self, content: Mapping[str, str]) -> None:
        begun = self.manifest.get("begun_in") or {}  # runs of older versions do not say
        before = Places(begun.get("directory", self.places.directory), begun.get("folder", self.places.folder))
        old, content = before.spelled(self.manifest["identity"]), self.places.spelled(content)
        differing = [key for key in sorted({*old, *content}) if old.get(key) != content.get(key)]
        if differing:
            shown = ", ".join(f"{key}: {_short(old.get(key))} -> {_short(content.get(key))}" for key in differing[:4])
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise RunError(
                f"holds a run with another configuration ({shown}{more})",
                where=self.folder.path,
                hint="choose another folder with --set out=DIR, or restore the configuration to resume",
            )

    def _save(self, **changes: Any) -> None:
        self.manifest.update(changes, updated=_now())
        storage.make_dirs(self.folder.path)
        storage.write_json(self.folder.manifest, self.manifest)


def _new_manifest(config: CensusConfig, content: Mapping[str, str], places: Places) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": config.name,
        "state": "running",
        "error": None,
        "created": _now(),
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


def _refuse_foreign(path: str) -> None:
    if storage.exists(path) and not storage.is_dir(path):
        raise RunError("is a file, not a folder", where=path, hint="choose another folder with --set out=DIR")
    # Our own logs and lease may be there first: a run that failed before its manifest was written.
    ours = tuple(storage.join(path, name) + "/" for name in ("logs", "lease"))
    if storage.is_dir(path) and not all(name.startswith(ours) for name in storage.list_files(path, ("",))):
        raise RunError(
            "the output folder is not empty and not a run", where=path, hint="choose another folder with --set out=DIR"
        )


def _short(value: str | None) -> str:
    text = "none" if value is None else value
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
