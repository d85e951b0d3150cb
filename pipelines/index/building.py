"""This module handles the folder of an unfinished build, beside the index, from which a killed build continues.

    INDEX.build/plan.json               what is being built; another build is refused
    INDEX.build/described/*.parquet     one file per chunk, counts in its name                         (`encode.py`)
    INDEX.build/groups.json             written once all chunks are there: which of them make which shard
    INDEX.build/ids/  repeats/          hashes of ids, and those that occur twice
    INDEX.build/probes.npz  template-REGION.json  shards/NAME.json  rejects/NAME.parquet  recall/NAME.npz

Each file is written completely or not at all, and after the files that it describes. The index's own manifest comes
last, and then this folder is removed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import RunError
from memscan.index.manifest import MANIFEST_FILE, FileEntry, Shard
from memscan.io import storage
from pipelines.index.encode import NOTES_ENDING, chunk_file, parse_name
from pipelines.run_folder.tables import read_table


@dataclass(frozen=True)
class Group:
    """A group is the chunks that make one shard.

    Args:
        name: of the shard.
        chunks: number, rows and good rows of each.
    """

    name: str
    chunks: tuple[tuple[int, int, int], ...]

    @property
    def rows(self) -> int:
        return sum(rows for _, rows, _ in self.chunks)

    @property
    def good(self) -> int:
        return sum(good for _, _, good in self.chunks)


@dataclass(frozen=True)
class BuildFolder:
    """This is the folder of a build. It can be pickled, and every method reads or writes storage."""

    index: str

    @property
    def folder(self) -> str:
        return self.index.rstrip("/") + ".build"

    def path(self, *names: str) -> str:
        return storage.join(self.folder, *names)

    def open(self, plan: Mapping[str, Any]) -> None:
        """Begin a build, or go on with it.

        Raises:
            RunError: another one was begun here.
        """
        text = json.dumps(plan, sort_keys=True)
        path = self.path("plan.json")
        if not storage.create_new(path, text.encode()):
            known = json.loads(storage.read_bytes(path))
            differing = [key for key in plan if known.get(key) != plan[key]]
            if differing:
                key = differing[0]
                raise RunError(
                    f"another build was begun here ({key}: {_short(known.get(key))} -> {_short(plan[key])})",
                    where=self.folder,
                    hint="remove that folder to begin again, or restore what differs to continue",
                )

    def is_of(self, plan: Mapping[str, Any]) -> bool:
        """Return whether exactly this build was begun here."""
        return bool(self.read_json("plan.json") == json.loads(json.dumps(plan)))

    def appended_to(self, plan: Mapping[str, Any]) -> int | None:
        """Return the version on which exactly this addition was begun; None if no such addition was begun here."""
        known = self.read_json("plan.json")
        if not isinstance(known, dict) or "appended to" not in known:
            return None
        begun = known.pop("appended to")
        return int(begun) if known == json.loads(json.dumps(plan)) else None

    def tidy(self) -> None:
        """Remove what a build left that was killed between its manifest and its clean-up: twice the index's size.

        An addition that is under way stays; a build cannot be, where the index is there already.
        """
        known = self.read_json("plan.json")
        if isinstance(known, dict) and "appended to" not in known and storage.exists(self.manifest):
            self.remove()

    @property
    def manifest(self) -> str:
        """This is the manifest of the finished index."""
        return storage.join(self.index, MANIFEST_FILE)

    def remove(self) -> None:
        storage.remove_tree(self.folder)

    def described(self) -> dict[int, tuple[int, int, int]]:
        """Return the chunks that are done, by number."""
        folder = self.path("described")
        files = storage.list_files(folder, ".parquet") if storage.is_dir(folder) else []
        done = [found for found in map(parse_name, files) if found]
        return {found[0]: found for found in done}

    def notes(self) -> list[dict[str, Any]]:
        """Return what the reading of chunks noted, in their order.

        These are members of tars that were not taken, and texts that were cleaned.
        """
        folder = self.path("described")
        files = storage.list_files(folder, NOTES_ENDING) if storage.is_dir(folder) else []
        return [storage.read_json(file) for file in files]

    def read_json(self, *names: str) -> Any:
        """Return the content of a record, or None if it does not exist yet."""
        path = self.path(*names)
        return storage.read_json(path) if storage.exists(path) else None

    def write_json(self, content: Any, *names: str) -> None:
        storage.write_atomic(self.path(*names), json.dumps(content).encode())

    def groups(self) -> list[Group] | None:
        found = self.read_json("groups.json")
        return None if found is None else [Group(g["name"], tuple(map(tuple, g["chunks"]))) for g in found]

    def write_groups(self, groups: Sequence[Group]) -> None:
        self.write_json([asdict(group) for group in groups], "groups.json")

    def shard(self, name: str) -> tuple[Shard, int] | None:
        """Return a shard that is done, and how many rows were rejected on the way to it."""
        found = self.read_json("shards", f"{name}.json")
        if found is None:
            return None
        entry = found["shard"]
        files = {file: FileEntry(**facts) for file, facts in entry["files"].items()}
        return Shard(**{**entry, "files": files}), found["rejected"]

    def write_shard(self, shard: Shard, rejected: int) -> None:
        self.write_json({"shard": asdict(shard), "rejected": rejected}, "shards", f"{shard.name}.json")

    def chunk(self, chunk: tuple[int, int, int], columns: list[str]) -> pa.Table:
        """Return columns of an encoded chunk."""
        return read_table(self.path("described", chunk_file(*chunk)), columns)

    def save_arrays(self, arrays: Mapping[str, np.ndarray], *names: str) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        storage.write_atomic(self.path(*names), buffer.getvalue())

    def load_arrays(self, *names: str) -> dict[str, np.ndarray] | None:
        path = self.path(*names)
        if not storage.exists(path):
            return None
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
            return dict(arrays)


def group_chunks(chunks: Sequence[tuple[int, int, int]], shard_rows: int, name: Callable[[int], str]) -> list[Group]:
    """Group chunks, in order, to shards of at most `shard_rows` rows; a larger chunk makes a shard alone."""
    groups: list[Group] = []
    waiting: list[tuple[int, int, int]] = []
    for chunk in sorted(chunks):
        if waiting and sum(good for _, _, good in waiting) + chunk[2] > shard_rows:
            groups.append(Group(name(len(groups)), tuple(waiting)))
            waiting = []
        waiting.append(chunk)
    if waiting:
        groups.append(Group(name(len(groups)), tuple(waiting)))
    return groups


def vectors_of(table: pa.Table, region: str) -> np.ndarray:
    """Return a column of vectors as (N, D) float32."""
    column = table[region]
    flat = pc.list_flatten(column.combine_chunks()).to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(table.num_rows, -1), dtype=np.float32)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
