"""This module chooses the files of a part.

Each prompt is in them once, whatever killed, stalled or doubled writers have left beside them.

A worker writes `census/part-00000/e000007/IDS-SHA256.parquet`: below the epoch of its driver, named by its rows and by
its bytes, with the run's fingerprint in the file's metadata. Files of runs of older versions lie in the part's folder
itself, which counts as epoch 0. A file is used completely or not at all: it must be readable, be what its name
promises, be of this run, and hold prompts of this part that no file taken before it holds. All others are ignored, and
removed once a commit record says that they are not part of the run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from memscan.io import storage
from pipelines.run_folder.tables import CensusFile, census_file_or_none, stamped, to_parquet

_PROMISED = re.compile(r"-([0-9a-f]{64})\.parquet$")
_EPOCH = re.compile(r"^e([0-9]{6,})/")


@dataclass(frozen=True)
class Choice:
    """These are the files of a part.

    Args:
        files: that make the part, in order.
        ids: of their rows.
        ignored: name -> why it is not among them.
    """

    files: tuple[CensusFile, ...]
    ids: frozenset[str]
    ignored: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]

    def rest_of(self, prompts: pa.Table) -> pa.Table:
        """Return the rows of PROMPTS that are in none of the files."""
        if not self.ids:
            return prompts
        return prompts.filter(pc.invert(pc.is_in(prompts["prompt_id"], pa.array(sorted(self.ids), pa.string()))))


def epoch_of(name: str) -> int:
    """Return the epoch that a file of a part was written in, by its name below the part's folder."""
    found = _EPOCH.match(name)
    return int(found[1]) if found else 0


def promised(name: str) -> str | None:
    """Return the sha256 that a file's name promises; None for files of older versions."""
    found = _PROMISED.search(name)
    return found[1] if found else None


def names_in(folder: str) -> list[str]:
    """Return Parquet files below a part's folder, by epoch and name; none if there is no folder."""
    if not storage.is_dir(folder):
        return []
    root = folder.rstrip("/") + "/"
    names = [file.removeprefix(root) for file in storage.list_files(folder, (".parquet",))]
    return sorted(names, key=lambda name: (epoch_of(name), name))


def choose(
    folder: str,
    names: Iterable[str],
    wanted: frozenset[str],
    fingerprint: str,
    columns: Sequence[str],
    known: Mapping[str, str] | None = None,
) -> Choice:
    """Take files in the order of `names`, each if it holds nothing that was taken before.

    Args:
        folder: of the part.
        wanted: ids of the part's prompts.
        fingerprint: of the run.
        columns: to read of each.
        known: name -> sha256 of files whose names do not promise one.
    """
    files: list[CensusFile] = []
    taken: set[str] = set()
    ignored: dict[str, str] = {}
    for name in names:
        file = census_file_or_none(folder, name, columns, fingerprint, promised(name) or (known or {}).get(name))
        if isinstance(file, str):
            ignored[name] = file
            continue
        ids = file.table["prompt_id"].to_pylist()
        own = set(ids)
        if not ids or len(own) < len(ids):
            ignored[name] = "holds a prompt twice" if ids else "holds no rows"
        elif not own <= wanted:
            ignored[name] = "holds prompts that are not of this part"
        elif not own.isdisjoint(taken):
            ignored[name] = "repeats prompts of another file"
        else:
            files.append(file)
            taken |= own
    return Choice(tuple(files), frozenset(taken), ignored)


def write_census(folder: str, rows: pa.Table, epoch: int, fingerprint: str) -> str:
    """Write rows of CENSUS into a part's folder; their file's name below it. Written again, it is the same file.

    Raises:
        MemscanError: the place cannot be written.
    """
    data = to_parquet(stamped(rows, fingerprint) if fingerprint else rows)
    ids = hashlib.sha256("\n".join(rows["prompt_id"].to_pylist()).encode()).hexdigest()[:24]
    name = f"{ids}-{hashlib.sha256(data).hexdigest()}.parquet"
    name = f"e{epoch:06d}/{name}" if epoch else name
    storage.create_new(storage.join(folder, name), data)  # that it is there already means that it is done
    return name
