"""Changes of an index at once: each is there afterwards, in whatever order their steps come; and repair."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscan.errors import IndexLoadError, RunError
from memscan.index import Manifest, write_index
from memscan.index.change import compact, prune, remove, removed_rows
from memscan.index.manifest import version_file
from memscan.index.repair import repair
from memscan.io import storage
from memscan.io.register import Register
from memscan.models.specification import ModelSpec

EMBEDDER = ModelSpec("embedder", "planted", "ab" * 32, "square64")
SEGMENTER = ModelSpec("segmenter", "planted", "ef" * 32, "square64")
ROWS = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, copies: Any) -> str:
    folder = str(tmp_path_factory.mktemp("small") / "index")
    vectors = {region: part[:ROWS] for region, part in copies.vectors.items()}
    write_index(folder, copies.table.slice(0, ROWS), vectors, "Flat", 1, EMBEDDER, SEGMENTER, shard_rows=4)
    return folder


@pytest.fixture
def index(small: str, tmp_path: Path) -> str:
    return str(shutil.copytree(small, tmp_path / "index"))


def kept(folder: str) -> int:
    """References that can be found, of an index whose files are all good."""
    manifest = Manifest.load(folder)
    manifest.verify(folder)
    assert sum(map(len, removed_rows(folder, manifest))) == manifest.removed_count
    return manifest.count


def between(monkeypatch: pytest.MonkeyPatch, folder: str, step: int, other: Callable[[], object]) -> Callable[[], int]:
    """Let `other` run, whole, before the `step`-th write into the index; gives how many writes there were."""
    count = 0

    def counted(real: Any) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if any(str(arg).startswith(folder + "/") for arg in args):  # and not into the cache of verified files
                count += 1
                if count == step + 1:
                    other()
            return real(*args, **kwargs)

        return write

    for name in ("create_new", "write_atomic", "move_in"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
    return lambda: count


@pytest.mark.parametrize("first", ["remove", "compact"])
@pytest.mark.parametrize("second", ["remove", "compact"])
def test_every_change_is_there_whatever_comes_between_its_steps(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, rng: np.random.Generator
) -> None:
    """Between two of them, drawn by MEMSCAN_TEST_SEED; between all of them with MEMSCAN_EXHAUSTIVE=1."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    remove(index, ["ref-00000"])
    changes: dict[str, Callable[[str, str], Manifest]] = {
        "remove": lambda folder, name: remove(folder, [name]),
        "compact": lambda folder, _: compact(folder),
    }
    gone = 1 + (first == "remove") + (second == "remove")

    def changed(step: int) -> int:
        """The first change with the whole second one before its `step`-th write; how many writes there were."""
        folder = str(shutil.copytree(index, tmp_path / f"at-{step}"))
        with monkeypatch.context() as patched:
            writes = between(patched, folder, step, lambda: changes[second](folder, "ref-00005"))
            changes[first](folder, "ref-00001")
        assert kept(folder) == ROWS - gone + (step < 0 and second == "remove")
        shutil.rmtree(folder)
        return writes()

    steps = changed(-2)
    assert steps >= 3
    exhaustive = "MEMSCAN_EXHAUSTIVE" in os.environ
    for step in range(steps) if exhaustive else rng.choice(steps, 2, replace=False).tolist():
        changed(step)


def test_threads_that_take_down_one_each_all_succeed(index: str) -> None:
    failed: list[Exception] = []

    def take_down(name: str) -> None:
        try:
            remove(index, [name])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=take_down, args=(f"ref-{at:05d}",)) for at in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert kept(index) == ROWS - 5
    assert Manifest.load(index).version == 6


def test_a_copy_of_the_manifest_that_came_late_does_not_count(index: str) -> None:
    old = storage.read_bytes(f"{index}/manifest.json")
    remove(index, ["ref-00000"])
    storage.write_atomic(f"{index}/manifest.json", old)
    assert kept(index) == ROWS - 1
    assert remove(index, ["ref-00001"]).version == 3
    assert kept(index) == ROWS - 2


def test_repair_goes_back_to_the_last_good_version_and_keeps_takedowns(index: str) -> None:
    remove(index, ["ref-00000"])
    second = remove(index, ["ref-00001"])
    third = compact(index)
    damaged = next(name for name, _ in third.files() if "-" in name and name.endswith("whole.faiss"))
    Path(index, damaged).write_bytes(b"no index")
    # What two takedowns at once did before: the file of one under the name of the other.
    overwritten = str(second.removed_file)
    assert Manifest.load(index, 2).removed_file is not None
    shutil.copy(Path(index, str(Manifest.load(index, 2).removed_file)), Path(index, overwritten))
    done = repair(index)
    assert (done.good, sorted(done.dropped), done.removed) == (2, [3, 4], 0)
    assert kept(index) == ROWS - 1  # ref-00001 stands in no readable file any more
    assert "whole.faiss" in done.dropped[4]
    assert repair(index).dropped == {}


def test_repair_makes_a_takedown_again_whose_version_is_given_up(index: str) -> None:
    manifest = remove(index, ["ref-00000", "ref-00007"])
    Path(version_file(index, manifest.version)).write_text("{")
    Path(index, "manifest.json").write_text("{")
    with pytest.raises(IndexLoadError, match="verify --repair"):
        Manifest.load(index)
    done = repair(index)
    assert (done.good, done.removed) == (1, 2)
    assert kept(index) == ROWS - 2
    for number in (1, 2, 3, 4):
        storage.remove_tree(version_file(index, number))
    with pytest.raises(IndexLoadError, match="no index here"):
        repair(index)


def test_a_change_that_always_comes_too_late_says_so(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Register, "swap", lambda *_: False)
    monkeypatch.setattr("memscan.index.change.time.sleep", lambda _: None)
    with pytest.raises(RunError, match="12 attempts came too late; nothing was changed"):
        remove(index, ["ref-00000"])


def test_a_register_changes_once_whoever_tries_and_a_number_is_never_used_twice(tmp_path: Path) -> None:
    register = Register(str(tmp_path / "register"))
    assert register.latest() == 0
    assert register.swap(0, b"a")
    assert not register.swap(0, b"b")
    assert register.swap(0, b"a")  # a put whose answer was lost, given again
    assert register.swap(1, b"c")
    assert not register.swap(1, b"d")
    for number in range(2, 9):
        assert register.swap(number, str(number).encode())
    register.keep(2)
    assert register.numbers() == [8, 9]
    assert not register.swap(1, b"late")  # its number had been there and is gone
    assert not register.swap(0, b"later")
    assert register.latest() == 9
    register.keep(0)
    assert register.latest() == 9


def test_prune_at_the_same_time_loses_no_takedown(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(index, ["ref-00000"])
    with monkeypatch.context() as patched:
        between(patched, index, 1, lambda: prune(index))
        remove(index, ["ref-00001"])
    assert kept(index) == ROWS - 2


def test_what_a_lost_compaction_left_is_swept_when_it_is_old(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(index, ["ref-00000"])
    before = set(storage.list_files(index, ("",)))
    with monkeypatch.context() as patched:
        patched.setattr(Register, "swap", lambda *_: False)
        patched.setattr("memscan.index.change.time.sleep", lambda _: None)
        with pytest.raises(RunError, match="came too late"):
            compact(index)
    orphans = set(storage.list_files(index, ("",))) - before
    assert orphans
    Path(index + ".build").mkdir()
    assert not orphans & set(prune(index, keep=9))
    monkeypatch.setattr("memscan.index.change.ORPHAN_SECONDS", 0.0)
    assert not orphans & set(prune(index, keep=9))  # something is being added: its shards are in no version yet
    Path(index + ".build").rmdir()
    assert set(prune(index, keep=9)) == orphans
    assert kept(index) == ROWS - 1
    assert kept(index) == compact(index).count


def test_a_compaction_whose_files_are_pruned_before_its_version_changes_nothing(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(index, ["ref-00000"])
    real = storage.exists
    # A compacted shard's name has a dash.
    monkeypatch.setattr(storage, "exists", lambda path: not re.search(r"/shards/[^/]*-", str(path)) and real(path))
    with pytest.raises(RunError, match="was pruned meanwhile; nothing was changed; run it again"):
        compact(index)
    monkeypatch.undo()
    assert kept(index) == ROWS - 1
