"""Sources of reference images: what is looked at, and that chunks are exactly the source."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.errors import InputError
from memscan.sources.reading import BATCH_ROWS, REFERENCE_ROWS, ChunkReader, open_source
from memscan.sources.webdataset import read_tar


def table(rows: int, **renamed: str) -> pa.Table:
    names = {"reference_id": "reference_id", "image": "image", **renamed}
    return pa.table(
        {
            names["reference_id"]: [f"id-{number}" for number in range(rows)],
            names["image"]: pa.array([bytes([number % 256]) * 3 for number in range(rows)], pa.binary()),
        }
    )


def read(path: Path, order: Any = None) -> pa.Table:
    source = open_source(str(path))
    chunks = source.chunks().to_pylist()
    reader = ChunkReader(source)
    assert all(chunk["stop"] - chunk["start"] <= BATCH_ROWS for chunk in chunks)
    return pa.concat_tables([reader.read(chunk) for chunk in (order(chunks) if order else chunks)])


@given(rows=st.integers(1, 400), group=st.integers(1, 300), reverse=st.booleans())
def test_chunks_are_the_source(tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, reverse: bool) -> None:
    path = tmp_path_factory.mktemp("refs") / "r.parquet"
    pq.write_table(table(rows), path, row_group_size=group)
    found = read(path, (lambda chunks: chunks[::-1]) if reverse else None)
    assert found.schema == REFERENCE_ROWS
    wanted = dict(zip(*table(rows).to_pydict().values(), strict=True))
    assert dict(zip(found["reference_id"].to_pylist(), found["image"].to_pylist(), strict=True)) == wanted
    assert found.num_rows == rows


def test_columns_are_found_by_their_usual_names(tmp_path: Path) -> None:
    renamed = table(3, reference_id="KEY", image="jpg").append_column("TEXT", pa.array(["a", "b", None]))
    pq.write_table(renamed.append_column("URL", pa.array(["u", None, None])), tmp_path / "r.parquet")
    found = read(tmp_path / "r.parquet").to_pydict()
    assert found["caption"] == ["a", "b", None]
    assert found["url"] == ["u", None, None]


def test_hugging_face_images_and_integer_ids(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"x", "path": "p"}, {"bytes": None, "path": "q"}])
    pq.write_table(pa.table({"id": [7, 8], "image": image}), tmp_path / "r.parquet")
    found = read(tmp_path / "r.parquet").to_pydict()
    assert found["reference_id"] == ["7", "8"]
    assert found["image"] == [b"x", None]


def test_folder_of_images_with_captions_beside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "a.txt").write_text("a  caption\n")
    (tmp_path / "sub" / "b.JPG").write_bytes(b"two")
    (tmp_path / "notes.md").write_text("no image")
    rows = read(tmp_path).select(["reference_id", "caption", "url", "image"]).to_pylist()
    assert rows == [
        {"reference_id": "a.png", "caption": "a caption", "url": None, "image": b"one"},
        {"reference_id": "sub/b.JPG", "caption": None, "url": None, "image": b"two"},
    ]


def test_an_image_that_vanishes_is_a_row_without_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    (chunk,) = source.chunks().to_pylist()
    assert ChunkReader(source).read(chunk)["image"].to_pylist() == [None, b"x"]


def broken(path: Path) -> None:
    path.write_bytes(b"PAR1 not really")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: pq.write_table(table(3, image="pixels"), path), "has no image column"),
        (lambda path: pq.write_table(table(0), path), "is empty"),
        (lambda path: pq.write_table(pa.table({"id": ["a"], "image": ["text"]}), path), "not encoded images"),
        (broken, "not a readable Parquet file"),
    ],
)
def test_a_source_that_cannot_be_one_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "r.parquet")
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(tmp_path / "r.parquet"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_source(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        open_source(str(tmp_path / name))


def test_image_paths_out_of_metadata_stay_below_their_root(tmp_path: Path) -> None:
    """A row that leads elsewhere is a reject: what a data set says is not what this machine reads."""
    root = tmp_path / "images"
    paths = ["a.png", "sub/b.png", str(root / "c.png"), "../secret", "/etc/passwd", "s3://other/key", None]
    np.save(tmp_path / "img_emb_0.npy", np.ones((len(paths), 4), np.float16))
    pq.write_table(pa.table({"image_path": pa.array(paths, pa.string())}), tmp_path / "metadata_0.parquet")
    source = open_source(str(tmp_path), image_root=str(root))
    (chunk,) = source.chunks().to_pylist()
    rows = ChunkReader(source).read(chunk).to_pylist()
    assert [row["path"] for row in rows] == [*(str(root / n) for n in ("a.png", "sub/b.png", "c.png")), *[None] * 4]
    assert [row["reason"] for row in rows] == [None, None, None, *["image_missing"] * 3, None]
    assert "see index.image_root" in rows[3]["message"]


def test_images_of_more_bytes_than_any_needs_are_rows_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memscan.io.images.MAX_BYTES", 100)
    monkeypatch.setattr("memscan.sources.webdataset.MAX_BYTES", 100)
    for name, size in (("a", 100), ("b", 5000)):
        (tmp_path / f"{name}.png").write_bytes(b"x" * size)
    source = open_source(str(tmp_path))
    (chunk,) = source.chunks().to_pylist()
    rows = ChunkReader(source).read(chunk).to_pylist()
    assert [(row["reason"], len(row["image"] or b"")) for row in rows] == [(None, 100), ("image_too_large", 0)]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(tmp_path / f"{name}.png", f"{name}.png")
    (batch,) = read_tar(str(tmp_path / "0.tar"), "0.tar", 10)
    assert [(row.get("reason"), len(row.get("image") or b"")) for row in batch] == [(None, 100), ("image_too_large", 0)]
