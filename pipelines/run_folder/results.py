"""What a scanned run holds, for everything that comes after the scan: its census files, and the references it met."""

from __future__ import annotations

from memscan.census.tally import Tally
from memscan.errors import IndexLoadError, RunError
from memscan.index.manifest import Manifest
from memscan.io import storage
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import ids_or_none


def census_files(run: Run, partial: bool) -> list[str]:
    """Files of the run's rows: those that commit records name, and in a partial run those of unfinished parts.

    Raises:
        RunError: the run is not complete, and `partial` is not given.
    """
    if run.state != "complete" and not partial:
        raise RunError(
            f"the run is not complete (state: {run.state})",
            where=run.folder.path,
            hint="resume the scan with the same command, or give --partial for figures of what is there",
        )
    files: list[str] = []
    for number in run.parts:
        folder, record = run.folder.census_part(number), run.folder.commit_record(number)
        if storage.exists(record):
            files += [storage.join(folder, name) for name in storage.read_json(record)["files"]]
        elif partial:
            files += _unfinished(folder)
    return files


def relative(run: Run, file: str) -> str:
    """A file's path inside the run folder, which may be moved."""
    return file.removeprefix(run.folder.path.rstrip("/") + "/")


def _unfinished(folder: str) -> list[str]:
    """Readable files of an uncommitted part. A file that repeats rows of an earlier one is what a resume would drop."""
    seen: set[str] = set()
    files = []
    for file in storage.list_files(folder, (".parquet",)) if storage.is_dir(folder) else []:
        ids = ids_or_none(file)
        if ids and seen.isdisjoint(ids):
            files.append(file)
            seen |= ids
    return files


def check_conserved(run: Run, tally: Tally) -> None:
    """The rows that were judged are the rows that the scan committed, or no rate is published."""
    counts = run.manifest["counts"]
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
    """The images of the index that judged this run: where the scan had it, or in the run folder if that moved.

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
