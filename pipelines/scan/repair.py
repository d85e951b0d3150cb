"""This module repairs a run whose files are not what was committed: intact files stay, and other rows are done again.

For every part, it checks that the commit record is readable, that the files exist, have the committed bytes and belong
to this run, and that they hold each prompt of the part once. A part that fails the check is opened again with its
intact files; one switch of the run's state does this for all such parts. The scan then does the missing rows. Files
that no commit record names are removed. Everything that is dropped is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from memscan.config import PromptsConfig
from memscan.errors import RunError
from memscan.io import storage
from memscan.prompts.table import read_prompts
from pipelines.run_folder.lease import hold
from pipelines.run_folder.parts import Choice, choose, names_in
from pipelines.run_folder.results import part_files
from pipelines.run_folder.runs import Run


@dataclass(frozen=True)
class Mended:
    """This says what a repair found and did.

    Args:
        dropped: path of what does not count any more -> why.
        rows: part -> rows that are to be done again.
        prompts: parts whose prompts were made again.
    """

    dropped: dict[str, str]
    rows: dict[int, int]
    prompts: tuple[int, ...]


def mend(path: str, say: Callable[[str], None] = lambda text: None) -> Mended:
    """Bring a run's folder into order; a scan completes it where rows are missing then.

    Raises:
        RunError: no run, one that is being worked on, or prompts that are damaged and cannot be made again.
    """
    run = Run.load(path)
    with hold(run.folder.leases, say, run.epoch) as lease:
        run = Run.load(path)
        run.lease = lease
        prompts = _mend_prompts(run)
        dropped: dict[str, str] = {}
        kept: dict[int, list[str]] = {}
        rows: dict[int, int] = {}
        for number in run.parts:
            try:
                if run.commit_record(number) is None:
                    continue  # unfinished: a scan takes what is whole and does the rest
                part_files(run, number, ["prompt_id"])
            except RunError as error:
                found = _sound(run, number)
                kept[number], rows[number] = found.names, run.prompts(number).num_rows - len(found.ids)
                dropped[error.where or run.folder.census_part(number)] = error.what
                dropped |= {f"{run.folder.census_part(number)}/{name}": why for name, why in found.ignored.items()}
                continue
            named = set(run.committed_files(number))
            surplus = [name for name in names_in(run.folder.census_part(number)) if name not in named]
            for name in run.sweep(number, surplus):
                dropped[f"{run.folder.census_part(number)}/{name}"] = "no part of the run"
        if kept:
            lease.check()
            run.reopen(kept)
    return Mended(dropped, rows, tuple(prompts))


def _as_written(run: Run) -> PromptsConfig:
    """Return the prompt files by the names that they had when the run began, which its rows carry."""
    prompts = run.config().prompts
    paths = json.loads(run.manifest["identity"].get("prompts.paths", "null")) or prompts.paths
    return prompts.model_copy(update={"paths": paths}) if all(map(storage.exists, paths)) else prompts


def _mend_prompts(run: Run) -> list[int]:
    """Parts whose prompts are damaged, made again from the prompt files."""
    damaged = []
    for number in run.parts:
        try:
            run.prompts(number)
        except RunError:
            damaged.append(number)
    if damaged:
        facts, prompts = run.manifest["prompts"], read_prompts(_as_written(run))
        known, left = facts.get("sha256"), set(damaged)
        for number, table in enumerate(prompts.parts(int(facts["part_size"]))):
            if number not in left:
                continue
            again = run.write_prompts_part(number, table)
            left.discard(number)
            if prompts.num_rows != facts["distinct"] or (known and again != known[number]):
                raise RunError(
                    f"part {number}: its prompts are damaged, and the prompt files have changed since",
                    where=run.folder.prompts_part(number),
                    hint="restore the prompt files, then run it again",
                )
    return damaged


def _sound(run: Run, number: int) -> Choice:
    """Of all files that may belong to a committed part that is damaged: those that do, and why the others do not.

    Files that its commit record names come first, and must have the bytes that it promises.
    """
    folder, wanted = run.folder.census_part(number), frozenset(run.prompts(number)["prompt_id"].to_pylist())
    try:
        record = run.commit_record(number) or {}
    except RunError:
        record = {}
    names = [name for name in record.get("files", ()) if storage.exists(storage.join(folder, name))]
    names += run.candidates(number)
    return choose(folder, dict.fromkeys(names), wanted, run.fingerprint, ["prompt_id"], record.get("sha256", {}))
