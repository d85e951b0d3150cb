"""An index that changes: additions, takedowns, compaction; and versions that stay what they were."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscan.errors import IndexLoadError, InputError, RunError
from memscan.index import Manifest, ReferenceIndex, write_index
from memscan.index.change import append, compact, prune, remove
from memscan.index.manifest import Shard
from memscan.index.shards import read_template, write_shard
from memscan.io import storage
from memscan.models.specification import ModelSpec

EMBEDDER = ModelSpec("embedder", "planted", "ab" * 32, "square64")
SEGMENTER = ModelSpec("segmenter", "planted", "ef" * 32, "square64")
FACTORIES = ["Flat", "IVF16,Flat", "IVF16,PQ16x4np"]
HALF = 1200


@pytest.fixture(scope="module", params=FACTORIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, copies: Any) -> str:
    """An index of the first half of the references, in shards of 500."""
    folder = str(tmp_path_factory.mktemp("half") / "index")
    vectors = {region: part[:HALF] for region, part in copies.vectors.items()}
    write_index(folder, copies.table.slice(0, HALF), vectors, request.param, 16, EMBEDDER, SEGMENTER, shard_rows=500)
    return folder


@pytest.fixture
def half(built: str, tmp_path: Path) -> str:
    """A copy of it."""
    return str(shutil.copytree(built, tmp_path / "index"))


def delta(folder: str, copies: Any, name: str = "000002.00000") -> Shard:
    """A shard of the second half."""
    manifest = Manifest.load(folder)
    parts = {region: partial(lambda part: part[HALF:], part) for region, part in copies.vectors.items()}
    template = partial(read_template, folder, factory=manifest.factory)
    return write_shard(folder, name, [copies.table.slice(HALF)], parts, template, manifest.factory)


def found(folder: str, copies: Any, version: int | None = None, k: int = 5) -> list[list[str]]:
    index = ReferenceIndex.open(folder, EMBEDDER, version=version)
    return [[hit.reference_id for hit in hits] for hits in index.search({"whole": copies.queries["whole"]}, k)]


def exact(copies: Any, rows: np.ndarray, k: int = 1) -> list[set[str]]:
    similarity = copies.queries["whole"] @ copies.vectors["whole"][rows].T
    ids = np.array(copies.table["reference_id"].to_pylist())[rows]
    return [set(ids[line >= np.sort(line)[-k] - 1e-3]) for line in similarity]


def test_what_is_added_is_found_and_the_version_before_is_not_changed(half: str, copies: Any) -> None:
    before = found(half, copies)
    manifest = append(half, [delta(half, copies)], source_rows=1300, rejected=100)
    assert (manifest.version, manifest.count, manifest.rejected) == (2, 2400, 100)
    assert found(half, copies, version=1) == before
    for names, nearest in zip(found(half, copies), exact(copies, np.arange(2400)), strict=True):
        assert names[0] in nearest
    with pytest.raises(InputError, match=r"shard 000002\.00000 is there already"):
        append(half, list(manifest.shards[-1:]))


def test_what_is_removed_is_in_no_answer_and_goes_when_compacted(half: str, copies: Any, tmp_path: Path) -> None:
    append(half, [delta(half, copies)])
    gone = sorted({names[0] for names in found(half, copies)})
    manifest = remove(half, gone)
    assert (manifest.version, manifest.removed_count) == (3, len(gone))
    assert remove(half, gone[:2]).version == 3  # again: nothing to do
    after = found(half, copies)
    assert not set(gone) & {name for names in after for name in names}
    kept = np.array([row for row, name in enumerate(copies.table["reference_id"].to_pylist()) if name not in gone])
    for names, nearest in zip(after, exact(copies, kept), strict=True):
        assert names[0] in nearest
        assert len(names) == 5  # what was removed is made up for
    major = ReferenceIndex.open(half, EMBEDDER, access="shard-major").search({"whole": copies.queries["whole"]}, 5)
    assert [[hit.reference_id for hit in hits] for hits in major] == after
    small = compact(half)
    assert (small.version, small.count, small.rows, small.removed_count) == (4, 2400 - len(gone), 2400 - len(gone), 0)
    assert found(half, copies) == after
    small.verify(half)
    assert compact(half) == small


def test_a_takedown_that_is_not_there_removes_nothing(half: str) -> None:
    with pytest.raises(InputError, match=r"no reference 'nobody' in the index.*nothing was removed"):
        remove(half, ["ref-00000", "nobody"])
    assert Manifest.load(half).version == 1


def test_an_index_of_nothing_is_refused(tmp_path: Path, copies: Any) -> None:
    folder = str(tmp_path / "index")
    three = {region: part[:3] for region, part in copies.vectors.items()}
    write_index(folder, copies.table.slice(0, 3), three, "Flat", 1, EMBEDDER, SEGMENTER)
    remove(folder, copies.table["reference_id"].to_pylist()[:3])
    assert found(folder, copies) == [[] for _ in range(100)]
    with pytest.raises(InputError, match="nothing would be left"):
        compact(folder)


def test_prune_deletes_what_no_kept_version_names(half: str, copies: Any) -> None:
    append(half, [delta(half, copies)])
    remove(half, ["ref-00003", "ref-02000"])
    compact(half)
    expected = found(half, copies)
    files = {name for name, _ in Manifest.load(half).files()}
    prune(half)
    left = {file.removeprefix(half + "/") for file in storage.list_files(half, "")}
    assert left == files | {"manifest.json", "versions/000004.json"}
    assert found(half, copies) == expected
    with pytest.raises(IndexLoadError, match="has no version 1"):
        ReferenceIndex.open(half, EMBEDDER, version=1)
    assert remove(half, ["ref-00005"]).version == 5  # numbers are not used twice


def test_two_changes_at_once_are_one_change_and_one_error(half: str) -> None:
    first = Manifest.load(half)
    remove(half, ["ref-00001"])
    with pytest.raises(RunError, match="version 2 was made by somebody else"):
        dataclasses.replace(first, version=2, why="another").save(half)
