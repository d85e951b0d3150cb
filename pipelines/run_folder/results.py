"""This module gives the results of a scan to later commands: the census files, and the references that they match."""

from __future__ import annotations

from collections.abc import Sequence

from memscan.census.tally import Tally
from memscan.errors import IndexLoadError, RunError
from memscan.index.manifest import Manifest
from memscan.io import storage
from pipelines.run_folder.parts import Choice, promised
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import census_file_or_none


def census_files(run: Run, partial: bool) -> list[str]:
    """Return files of the run's rows: those that commit records name, and in a partial run those of unfinished parts.

    Raises:
        RunError: the run is not complete, and `partial` is not given; or a commit record is damaged.
    """
    if run.state != "complete" and not partial:
        raise RunError(
            f"the run is not complete (state: {run.state})",
            where=run.folder.path,
            hint="resume the scan with the same command, or give --partial for figures of what is there",
        )
    files: list[str] = []
    for number in run.parts:
        folder, record = run.folder.census_part(number), run.commit_record(number)
        if record is not None:
            files += [storage.join(folder, name) for name in record["files"]]
        elif partial:
            files += [storage.join(folder, name) for name in run.whole_files(number)]
    return files


def part_files(run: Run, number: int, columns: Sequence[str]) -> Choice:
    """Read the files of a committed part, whole, and compare them with its commit record.

    Args:
        columns: that are wanted of their rows.

    Raises:
        RunError: a file is missing, damaged, of another run, or holds other rows than were committed.
    """
    record, folder = run.commit_record(number), run.folder.census_part(number)
    if record is None:
        raise RunError(f"part {number} is not committed", where=run.folder.path, hint="resume the scan")
    known, files = record.get("sha256", {}), []
    ids: set[str] = set()
    for name in record["files"]:
        if not storage.exists(storage.join(folder, name)):
            raise _spoilt(run, number, name, "is missing")
        file = census_file_or_none(folder, name, columns, run.fingerprint, known.get(name) or promised(name))
        if isinstance(file, str):
            raise _spoilt(run, number, name, file)
        own = file.table["prompt_id"].to_pylist()
        if len(set(own)) < len(own) or not ids.isdisjoint(own):
            raise _spoilt(run, number, name, "repeats prompts")
        ids.update(own)
        files.append(file)
    wanted = frozenset(run.prompts(number)["prompt_id"].to_pylist())
    if ids != wanted:
        raise _spoilt(run, number, "", f"holds {len(ids - wanted)} foreign prompts and lacks {len(wanted - ids)}")
    return Choice(tuple(files), frozenset(ids), {})


def read_checked(run_path: str, path: str, sha256: str | None, fingerprint: str) -> bytes:
    """Return the bytes of a census file, compared with what was committed.

    Raises:
        RunError: the file is missing, damaged or of another run; says how its part is done again.
    """
    inner = path.removeprefix(storage.join(run_path, "census")).strip("/")
    part, _, name = inner.partition("/")
    folder, number = path.removesuffix(name), int(part.removeprefix("part-"))
    if not storage.exists(path):
        raise _spoilt_at(run_path, number, path, "is missing")
    file = census_file_or_none(folder, name, [], fingerprint, sha256 or promised(name))
    if isinstance(file, str):
        raise _spoilt_at(run_path, number, path, file)
    return file.data


def hashes(run: Run) -> dict[str, str]:
    """Return, by path of a committed census file, the sha256 in its commit record; runs of older versions have none."""
    found = {}
    for number in run.parts:
        record = run.commit_record(number)
        for name, digest in (record or {}).get("sha256", {}).items():
            found[storage.join(run.folder.census_part(number), name)] = str(digest)
    return found


def _spoilt(run: Run, number: int, name: str, what: str) -> RunError:
    return _spoilt_at(run.folder.path, number, storage.join(run.folder.census_part(number), name), what)


def _spoilt_at(run: str, number: int, path: str, what: str) -> RunError:
    hint = f"`memscan repair-run {run}` does the lost rows of the part again"
    return RunError(f"part {number}: {what}", where=path, hint=hint)


def relative(run: Run, file: str) -> str:
    """Return a file's path inside the run folder, which may be moved."""
    return file.removeprefix(run.folder.path.rstrip("/") + "/")


def check_conserved(run: Run, tally: Tally) -> None:
    """The rows that were judged are the rows that the scan committed, or no rate is published."""
    counts = run.progress().to_json()
    found = {
        "inputs": tally.rows,
        "rows": tally.prompts,
        "done": tally.done,
        "rejected": tally.rejected.total(),
        "generations": tally.generations,
    }
    wrong = [name for name, value in found.items() if counts[name] != value]
    if wrong:
        listed = ", ".join(f"{name}: {counts[name]} committed, {found[name]} found" for name in wrong)
        raise RunError(f"rows do not add up ({listed})", where=run.folder.path, hint="restore the census files")


def reference_files(run: Run) -> list[str]:
    """Return the images of the index that judged this run: where the scan had it, or in the run folder if that moved.

    Empty where neither is that very index: another one's images must not be shown as evidence.
    """
    index = run.manifest["index"]
    for folder in (run.index, run.folder.index) if index else ():
        try:
            manifest = Manifest.load(folder, index.get("version"))
        except IndexLoadError:
            continue
        if manifest.hash == index["hash"]:
            return manifest.reference_files(folder)
    return []
