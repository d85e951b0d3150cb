"""This module replaces all outputs of the last reduce by those of the new one in one switch.

    RUN/.reduce/TOKEN/flagged/...  clusters/...  report.html   written first, where nobody looks
    RUN/.reduce/TOKEN/census.json                              written last; from now on these outputs count
    RUN/flagged/...  clusters/...  report.html  census.json    copies of them, for people and for other programs

census.json names the lists beside it with their hashes. Every reader of a reduced run calls `settle` first, which makes
the copies that a kill has prevented. So before the switch a run has the old outputs, and after it the complete new
ones. The next reduce removes what a reduce left that was killed before its switch. Of two simultaneous reduces, the one
that switches later remains, and one whose files were removed by the other says so.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from memscan.errors import InputError, MemscanError, RunError
from memscan.io import storage

CENSUS_FILE = "census.json"
_FOLDER = ".reduce"
LISTS = (
    *(f"flagged/{stem}{form}" for stem in ("flagged", "removal") for form in (".parquet", ".csv", ".jsonl")),
    *(f"clusters/{table}.parquet" for table in ("edges", "components", "assignments", "clusters")),
)


@contextmanager
def begun(run_dir: str) -> Iterator[str]:
    """The folder in which a reduce writes its outputs; removed where it does not come to `switch`."""
    settle(run_dir)
    staged = storage.join(run_dir, _FOLDER, secrets.token_hex(8))
    try:
        yield staged
    except BaseException:
        if not storage.exists(storage.join(staged, CENSUS_FILE)):
            with suppress(MemscanError):  # a full disk, as often as not the reason itself
                storage.remove_tree(staged)
        raise


def switch(run_dir: str, staged: str, document: dict[str, Any]) -> None:
    """Make what lies in a folder of `begun` the outputs of the run.

    Args:
        document: the content of census.json; gets the hashes of the lists.

    Raises:
        RunError: another reduce of the run has been written in the meantime.
    """
    _sweep(run_dir, staged)
    try:
        document["files"] = {name: storage.sha256_file(storage.join(staged, name)) for name in LISTS}
    except InputError as error:
        what = f"another reduce of this run was written in the meantime ({error.what})"
        raise RunError(what, where=run_dir, hint="run memscan reduce again") from error
    storage.write_json(storage.join(staged, CENSUS_FILE), document)
    settle(run_dir)


def settle(run_dir: str) -> None:
    """Make the copies of outputs that count already, where a kill came before they were made."""
    for census in _files(storage.join(run_dir, _FOLDER), (f"/{CENSUS_FILE}",)):
        staged = census.rpartition("/")[0]
        for file in [*(one for one in _files(staged, ("",)) if one != census), census]:
            try:
                data = storage.read_bytes(file)
            except InputError:
                if storage.exists(file):
                    raise
                continue  # another process has made its copy, and is clearing away
            target = storage.join(run_dir, file.removeprefix(staged))
            if not _is(target, data):
                storage.write_atomic(target, data)
        # The mark last: until then it can be done again, and what is gone here has its copy.
        for file in _files(staged, ("",)):
            if file != census:
                storage.remove_tree(file)
        storage.remove_tree(staged)
        if not storage.is_remote(run_dir):
            with suppress(OSError):  # of another reduce, which has begun
                os.rmdir(storage.join(run_dir, _FOLDER))


def _sweep(run_dir: str, staged: str) -> None:
    """Remove what other reduces have begun, and were perhaps killed at."""
    settle(run_dir)
    root = storage.join(run_dir, _FOLDER)
    tokens = {file.removeprefix(root + "/").partition("/")[0] for file in _files(root, ("",))}
    if not storage.is_remote(root) and os.path.isdir(root):
        tokens |= set(os.listdir(root))  # folders without a file, which a store does not know
    for token in tokens - {staged.rpartition("/")[2]}:
        storage.remove_tree(storage.join(root, token))


def _files(folder: str, endings: tuple[str, ...]) -> list[str]:
    return storage.list_files(folder, endings) if storage.is_dir(folder) else []


def _is(path: str, data: bytes) -> bool:
    return storage.exists(path) and storage.sha256_file(path) == hashlib.sha256(data).hexdigest()
