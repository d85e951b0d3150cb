"""Building indexes: four layouts, broken images, stopped builds, additions, s3://."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from memscan.errors import ConfigError, InputError, RunError
from memscan.index import Manifest, ReferenceIndex
from memscan.io import storage
from pipelines.cli import app
from pipelines.index.building import BuildFolder
from pipelines.index.job import build, extend
from pipelines.index.steps import MakeShard, Train
from pipelines.scan.scatter import open_scattered, shard_actors
from tests.support.local_ray import local_ray

COUNT = 140
BROKEN = {5: b"", 70: b"\xff\xd8\xff no image"}


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(out, "PNG")
    return BROKEN.get(number, out.getvalue())


def as_images(folder: Path) -> None:
    for number in range(COUNT):
        (folder / f"{number:04d}.png").write_bytes(picture(number))
        (folder / f"{number:04d}.txt").write_text(f"caption {number}")


def as_parquet(folder: Path) -> None:
    ids = [f"{number:04d}" for number in range(COUNT)]
    ids[100] = ids[3]  # of a repeated id, the first stays
    table = pa.table({"key": ids, "jpg": pa.array([picture(n) for n in range(COUNT)], pa.binary())})
    pq.write_table(table.append_column("TEXT", pa.array([f"caption {n}" for n in range(COUNT)])), folder / "a.parquet")


def as_tars(folder: Path) -> None:
    for tar, numbers in enumerate((range(80), range(80, COUNT))):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as file:
            for number in numbers:
                facts = json.dumps({"caption": f"caption {number}", "url": f"https://x/{number}"}).encode()
                for name, data in (("jpg", picture(number)), ("json", facts)):
                    member = tarfile.TarInfo(f"{tar:05d}{number:04d}.{name}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])


def as_embeddings(folder: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((COUNT, 48)).astype(np.float16)
    vectors[5], vectors[70] = 0, np.nan
    (folder / "img_emb").mkdir()
    (folder / "metadata").mkdir()
    for part, rows in enumerate((slice(0, 90), slice(90, COUNT))):
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", vectors[rows])
        numbers = range(*rows.indices(COUNT))
        table = {"url": [f"https://x/{n}" for n in numbers], "caption": [f"caption {n}" for n in numbers]}
        table["image_path"] = [f"images/{n}.png" for n in numbers]
        pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{part}.parquet")
    (folder / "images").mkdir()
    (folder / "images" / "7.png").write_bytes(picture(7))


LAYOUTS: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {
    "images": (as_images, {"image_undecodable": 2}),
    "parquet": (as_parquet, {"image_undecodable": 2, "id_repeated": 1}),
    "webdataset": (as_tars, {"image_undecodable": 2, "row_malformed": 1}),
    "embeddings": (as_embeddings, {"embedding_failed": 2}),
}


def settings(world: Any, source: Path, out: Path, **changes: object) -> Any:
    given = {"index__source": str(source), "index__path": str(out), "index__factory": "Flat", "index__shard_rows": 64}
    return world.config(out.parent / "run", **{**given, **changes})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_its_broken_rows(tiny_world: Any, in_process: None, tmp_path: Path, layout: str) -> None:
    make, reasons = LAYOUTS[layout]
    source, out = tmp_path / "source", tmp_path / "index"
    source.mkdir()
    make(source)
    manifest = build(settings(tiny_world, source, out))
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    assert Counter(row["reason"] for row in rejects) == reasons
    assert all(row["message"] for row in rejects)
    if layout == "webdataset":  # of the tar that breaks off, what follows is not known; all before is there
        assert 80 < manifest.source_rows < COUNT
    else:
        assert manifest.source_rows == COUNT
    assert manifest.source_rows == manifest.count + manifest.rejected == manifest.count + len(rejects)
    assert len(manifest.shards) >= 2
    assert manifest.recall["whole@1"] == 1
    assert not (tmp_path / "index.build").exists()
    index = ReferenceIndex.open(str(out), None)
    captions = [
        row["caption"] for file in manifest.reference_files(str(out)) for row in pq.read_table(file).to_pylist()
    ]
    wanted = [f"caption {n}" for n in range(COUNT) if n not in BROKEN and not (layout == "parquet" and n == 100)]
    assert captions == wanted[: manifest.count]
    if layout != "embeddings":
        assert index.manifest.regions == ("whole", "foreground", "background")
        assert index.fetch(7).image_HWC.shape == (32, 32, 3)
        assert index.fetch(7).mask_HW is not None
    else:
        vectors = np.load(source / "img_emb" / "img_emb_1.npy")[3:4].astype(np.float32)
        hit = index.search({"whole": vectors / np.linalg.norm(vectors)}, 1)[0][0]
        assert (hit.reference_id, round(hit.similarity, 4)) == ("img_emb_1/3", 1)


class Killed(BaseException):
    """What a signal would do: nobody catches it."""


@contextmanager
def killed_at(write: int) -> Iterator[list[int]]:
    """The process dies before its n-th write to storage; gives the number of writes so far."""
    done = [0]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if done[0] == write:
                raise Killed
            done[0] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_atomic", "move_in", "create_new"):
            patch.setattr(storage, name, counted(getattr(storage, name)))
        yield done


@pytest.fixture(scope="module")
def described(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that was stopped when everything was described; the rest of it is done in this process."""
    folder = tmp_path_factory.mktemp("described")
    (folder / "source").mkdir()
    as_parquet(folder / "source")

    def stop(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, local_ray():
        patch.setattr(Train, "queries", stop)
        with pytest.raises(Killed):
            build(ivf(tiny_world, folder, folder))
    return folder


def ivf(world: Any, described: Path, folder: Path) -> Any:
    return settings(world, described / "source", folder / "index", index__factory="IVF4,PQ8x4np")


def begin(described: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copytree(described / "index.build", folder / "index.build")


def states(folder: Path) -> dict[str, int]:
    """Files of the shards that are recorded as done, and when they were written."""
    done = [path.stem for path in (folder / "index.build" / "shards").glob("*.json")]
    files = [file for name in done for file in (folder / "index" / "shards" / name).iterdir()]
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_a_build_killed_at_any_step_ends_in_the_same_bytes(
    tiny_world: Any, in_process: None, described: Path, tmp_path: Path
) -> None:
    begin(described, tmp_path / "whole")
    with killed_at(10**9) as writes:
        expected = build(ivf(tiny_world, described, tmp_path / "whole"))
    steps = range(1, writes[0], max(1, writes[0] // 12))
    assert len(steps) >= 10
    for step in steps:
        folder = tmp_path / str(step)
        begin(described, folder)
        with killed_at(step), pytest.raises(Killed):
            build(ivf(tiny_world, described, folder))
        assert not (folder / "index" / "manifest.json").exists() or step >= writes[0] - 1
        before = states(folder)
        resumed = build(ivf(tiny_world, described, folder))
        assert (resumed, resumed.hash) == (expected, expected.hash)
        resumed.verify(str(folder / "index"))
        assert {file: Path(file).stat().st_mtime_ns for file in before} == before  # not made again
        assert not (folder / "index.build").exists()
        shutil.rmtree(folder)


def test_killed_when_only_the_folder_of_work_was_left(
    tiny_world: Any, in_process: None, described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Killed

    begin(described, tmp_path / "a")
    config = ivf(tiny_world, described, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(BuildFolder, "remove", stop)
        with pytest.raises(Killed):
            build(config)
    assert build(config) == Manifest.load(str(tmp_path / "a" / "index"))
    assert not (tmp_path / "a" / "index.build").exists()
    with pytest.raises(RunError, match="is there already"):
        build(config)


def test_what_a_killed_worker_leaves_half_made_is_swept(
    tiny_world: Any, in_process: None, described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is made again by another worker in the same build: found by the chaos runs."""
    begin(described, tmp_path / "a")
    make, left = MakeShard.__call__, tmp_path / "a" / "index" / "shards" / ".making-killed"

    def made_twice(self: MakeShard, at: int) -> int:
        left.mkdir(parents=True, exist_ok=True)
        (left / "references.parquet").write_bytes(b"half")
        return make(self, at)

    monkeypatch.setattr(MakeShard, "__call__", made_twice)
    build(ivf(tiny_world, described, tmp_path / "a")).verify(str(tmp_path / "a" / "index"))
    assert not left.exists()


def test_described_chunks_are_not_described_again(
    tiny_world: Any, in_process: None, described: Path, tmp_path: Path
) -> None:
    begin(described, tmp_path / "a")
    chunks = sorted((tmp_path / "a" / "index.build" / "described").glob("*.parquet"))
    assert len(chunks) == 3
    chunks[1].unlink()
    (tmp_path / "a" / "index.build" / "groups.json").unlink()
    before = {chunk: chunk.stat().st_mtime_ns for chunk in (chunks[0], chunks[2])}
    seen: dict[Path, int] = {}

    def look(*_: object) -> None:
        seen.update({chunk: chunk.stat().st_mtime_ns for chunk in chunks})
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Train, "queries", look)
        with pytest.raises(Killed):
            build(ivf(tiny_world, described, tmp_path / "a"))
    assert {chunk: seen[chunk] for chunk in before} == before
    assert chunks[1] in seen


def test_another_build_in_the_same_place_is_refused(
    tiny_world: Any, in_process: None, described: Path, tmp_path: Path
) -> None:
    begin(described, tmp_path / "a")
    with pytest.raises(RunError, match="another build was begun here"):
        build(settings(tiny_world, described / "source", tmp_path / "a" / "index", index__shard_rows=10))
    with pytest.raises(ConfigError, match="not a size: 'lots'"):
        build(settings(tiny_world, described / "source", tmp_path / "a" / "index", index__memory="lots"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("precious")
    with pytest.raises(RunError, match="is there already"):
        build(settings(tiny_world, described / "source", tmp_path / "b"))
    assert (tmp_path / "b" / "file").read_text() == "precious"


def test_additions_and_the_scattered_plan(tiny_world: Any, in_process: None, described: Path, tmp_path: Path) -> None:
    """References are added to an index, ids that it has are rejects; actors a shard answer as one process."""
    begin(described, tmp_path / "a")
    first = build(ivf(tiny_world, described, tmp_path / "a"))
    more = tmp_path / "more"
    more.mkdir()
    rows = {"id": ["0001", "new-1", "new-2"], "image": [picture(1), picture(1001), picture(1002)]}
    pq.write_table(pa.table({"id": rows["id"], "image": pa.array(rows["image"], pa.binary())}), more / "m.parquet")
    folder = str(tmp_path / "a" / "index")
    second = extend(settings(tiny_world, more, Path(folder)))
    assert (second.version, second.count) == (2, first.count + 2)
    assert (second.source_rows, second.rejected) == (first.source_rows + 3, first.rejected + 1)
    added = pq.read_table(tmp_path / "a" / "index" / "rejects-000002.parquet").to_pylist()
    assert [(row["reference_id"], row["reason"]) for row in added] == [("0001", "id_repeated")]
    index = ReferenceIndex.open(folder, None)
    queries = {r: np.concatenate([s.vectors(r)[:9] for s in index._access._shards]) for r in index.manifest.regions}
    expected = index.search(queries, 4)
    assert {"new-1", "new-2"} <= {hit.reference_id for hits in expected for hit in hits}
    with shard_actors(folder) as shards:
        scattered = open_scattered(folder, None, shards)
        assert scattered.search(queries, 4) == expected
        last = len(index) - 1
        np.testing.assert_array_equal(scattered.fetch(last).image_HWC, index.fetch(last).image_HWC)
    wrong = tmp_path / "vectors"
    wrong.mkdir()
    as_embeddings(wrong)
    with pytest.raises(
        InputError, match="gives vectors of length 48 for whole; the index has 48 for whole, foreground"
    ):
        extend(settings(tiny_world, wrong, Path(folder)))


def here(*arguments: str) -> str:
    """Standard output of a command, in this process."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_from_s3_to_s3_by_the_commands(
    tiny_world: Any, in_process: None, s3: Any, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources, build, index, looks and changes on a server that speaks S3."""
    monkeypatch.setenv("MEMSCAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    as_tars(tmp_path / "source")
    for file in (tmp_path / "source").iterdir():
        s3.put_file(str(file), f"{s3_bucket}/source/{file.name}")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**tiny_world.settings, "out": "unused"}))
    index = f"{s3_bucket}/index"
    here("index", "build", f"{s3_bucket}/source", index, "--config", str(config), "--set", "index.shard_rows=64")
    assert not s3.exists(f"{index}.build")
    info = json.loads(here("index", "info", index, "--json"))
    assert info["source_rows"] == info["references"] + info["rejected"]
    assert "sound" in here("index", "verify", index)
    assert json.loads(here("index", "recall", index, "--json"))["whole@1"] == 1
    (tmp_path / "query.png").write_bytes(picture(9))
    look = ["index", "search", index, str(tmp_path / "query.png"), "--config", str(config), "--json"]
    found = json.loads(here(*look))["hits"][0]
    assert (found["reference"], found["caption"], round(found["similarity"], 4)) == ("000000009", "caption 9", 1)
    assert json.loads(here(*look, "--plan", "shard-major"))["hits"][0] == found
    here("index", "remove", index, "000000009")
    assert json.loads(here(*look))["hits"][0]["reference"] != "000000009"
    here("index", "compact", index)
    here("index", "prune", index)
    assert "sound" in here("index", "verify", index)
    damaged = s3.glob(f"{index}/shards/*/whole.faiss")[-1]
    data = bytearray(s3.cat_file(damaged))
    data[len(data) // 2] ^= 1
    s3.pipe_file(damaged, bytes(data))
    refused = CliRunner().invoke(app, ["index", "verify", index])
    assert refused.exit_code == 2
    assert hashlib.sha256(bytes(data)).hexdigest() in refused.stderr
    assert damaged.rpartition("/")[2] in refused.stderr
    assert "Traceback" not in refused.stderr
