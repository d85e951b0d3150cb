"""References as people have them: nothing vanishes, every file and member is counted, ids of two sets are distinct."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from memscan.config import IndexConfig
from memscan.errors import InputError, RowReject
from memscan.inspection import inspect_paths, inspect_references, lines
from memscan.io.images import decode
from memscan.sources.configured import configured_source
from memscan.sources.reading import ChunkReader, check_images

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
QUIET = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(number: int = 0, kind: str = "PNG", size: int = 12) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def rows(path: Path | str, appended: bool = False, **options: Any) -> list[dict[str, Any]]:
    source = configured_source(IndexConfig(source=str(path), **options), appended=appended)
    reader = ChunkReader(source)
    found = [row for chunk in source.chunks().to_pylist() for row in reader.read(chunk).to_pylist()]
    assert source.rows in (None, len(found))
    return found


def facts(path: Path | str, **options: Any) -> dict[str, Any]:
    found = inspect_references(IndexConfig(source=str(path), **options))
    assert found["rows"] == found["images"] + sum(found["rejected"].values())
    assert lines(found)
    return found


# --- tars -------------------------------------------------------------------------------------------------------------

NAME = st.text(st.sampled_from("ab.1_ é-"), min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and name.strip(" .") == name
)


@QUIET
@given(names=st.lists(NAME, min_size=1, max_size=6, unique_by=str.lower), late=st.booleans(), folder=st.booleans())
def test_samples_of_any_name_are_all_there(tmp_path: Path, names: list[str], late: bool, folder: bool) -> None:
    """Dots in the sample's name, members in any order, a folder before them."""
    before = "some.folder/" if folder else ""
    images = {f"{before}{name}.jpg": picture(at) for at, name in enumerate(names)}
    texts = {f"{before}{name}.json": json.dumps({"caption": name, "url": f"u/{name}"}).encode() for name in names}
    path = tar_of(tmp_path / "00000.tar", {**images, **texts} if late else {**texts, **images})
    found = rows(path)
    assert [row["caption"] for row in found] == names
    assert [row["url"] for row in found] == [f"u/{name}" for name in names]
    assert len({row["reference_id"] for row in found}) == len(names)
    assert facts(path)["not_taken_count"] == 0


def test_members_that_are_no_images_are_named(tmp_path: Path) -> None:
    members = {
        "./a.jpg": picture(1, "JPEG"),
        "./._a.jpg": b"\x00\x05\x16\x07",
        "a.cls": b"7",
        "orphan.txt": b"no image",
        "b": picture(2),
        "c.jfif": picture(3, "JPEG"),
        "d.png": b"not one",
        ".DS_Store": b"x",
    }
    found = facts(tar_of(tmp_path / "0.tar", members))
    assert (found["images"], found["rejected"]) == (3, {"image_undecodable": 1})
    assert [name.removeprefix("0.tar/") for name in found["not_taken"]] == [
        "._a.jpg",
        "a.cls",
        ".DS_Store",
        "orphan.txt",
    ]


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_packed_tars(tmp_path: Path, keep: float) -> None:
    """A compressed tar is read, and one that breaks off gives what came before and one reject."""
    whole = tar_of(tmp_path / "x.tar", {f"{at}.png": picture(at, size=40) for at in range(9)}).read_bytes()
    packed = gzip.compress(whole)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "y.tar.gz").write_bytes(packed[: int(len(packed) * keep)])
    found = facts(tmp_path / "y")
    assert found["images"] == 9 if keep == 1 else 0 < found["images"] < 9
    assert found["rejected"] == ({} if keep == 1 else {"row_malformed": 1})


def test_two_data_sets_keep_their_ids_apart(tmp_path: Path) -> None:
    for name in ("cc3m", "cc12m"):
        (tmp_path / name).mkdir()
        tar_of(tmp_path / name / "00000.tar", {f"00000000{at}.jpg": picture(at) for at in range(3)})
    ids = [row["reference_id"] for row in rows(tmp_path)]
    assert ids == [f"{name}/00000000{at}" for name in ("cc12m", "cc3m") for at in range(3)]
    assert [row["reference_id"] for row in rows(tmp_path / "cc3m")] == [f"00000000{at}" for at in range(3)]
    assert next(row["reference_id"] for row in rows(tmp_path / "cc3m", appended=True)) == "cc3m/000000000"
    assert next(row["reference_id"] for row in rows(tmp_path / "cc3m", id_prefix="x-")) == "x-000000000"


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "0.tar", {"0.jpg": picture(), "0.json": b'{"caption": "half \\ud83d", "url": "u"}'})
    assert rows(path)[0]["caption"] == "half \ufffd"
    assert (facts(path)["images"], facts(path)["cleaned"]) == (1, 1)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_images_are_known_by_content(tmp_path: Path) -> None:
    formats = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.jpg_large": "JPEG", "d.ppm": "PPM", "e": "PNG", "f.data": "WEBP"}
    for at, (name, kind) in enumerate(formats.items()):
        (tmp_path / name).write_bytes(picture(at, kind))
    (tmp_path / "g.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + b"\x00" * 40)
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "._a.jfif").write_bytes(b"\x00")
    os.symlink(tmp_path / "nowhere", tmp_path / "h.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(9))
    found = facts(tmp_path)
    assert (found["images"], found["rejected"]) == (8, {"image_missing": 1})
    assert sorted(found["not_taken"]) == ["._a.jfif", "Thumbs.db"]
    assert "caf\\xe9.png" in {row["reference_id"] for row in rows(tmp_path)}
    with pytest.raises(RowReject, match="a HEIC image, which is not decoded here"):
        decode((tmp_path / "g.heic").read_bytes())
    kept = {row["reference_id"]: row["message"] for row in rows(tmp_path, images="path") if row["reason"]}
    assert "not UTF-8" in kept["caf\\xe9.png"]


def test_captions_beside_images(tmp_path: Path) -> None:
    """img2dataset's files with their table beside, and imagefolder's metadata in each of its forms."""
    (tmp_path / "00000").mkdir()
    for at in range(2):
        (tmp_path / "00000" / f"{at}.jpg").write_bytes(picture(at))
        (tmp_path / "00000" / f"{at}.json").write_text(json.dumps({"caption": f"j{at}", "url": f"u{at}"}))
    (tmp_path / "00000" / "0.txt").write_text("t0\n")
    pq.write_table(pa.table({"caption": ["a"], "url": ["b"]}), tmp_path / "00000.parquet")
    found = rows(tmp_path)
    assert [(row["caption"], row["url"]) for row in found] == [("t0", "u0"), ("j1", "u1")]
    assert facts(tmp_path)["not_taken"] == ["00000.parquet"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_imagefolder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "train" / "sub").mkdir(parents=True)
    table = {"file_name": ["0.png", "sub/1.png"], "text": ["first", "second, of two"]}
    file = tmp_path / "train" / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(table), file)
    elif kind == "csv":
        file.write_text('file_name,text\n0.png,first\nsub/1.png,"second, of two"\n')
    else:
        pairs = zip(*table.values(), strict=True)
        file.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in pairs))
    for at, name in enumerate(table["file_name"]):
        (tmp_path / "train" / name).write_bytes(picture(at))
    assert [row["caption"] for row in rows(tmp_path)] == table["text"]
    assert facts(tmp_path)["not_taken"] == []
    (tmp_path / "train" / "sub" / "1.png").unlink()
    found = {row["reference_id"]: row for row in rows(tmp_path)}
    assert found["train/0.png"]["reason"] is None
    assert found["train/sub/1.png"]["reason"] == "image_missing"
    assert found["train/sub/1.png"]["message"] == f"train/metadata.{kind} describes it, and it is not there"
    counted = facts(tmp_path)
    assert (counted["images"], counted["rows"], counted["rejected"]) == (1, 2, {"image_missing": 1})


@pytest.mark.parametrize("name", ["../out.png", "/etc/hostname", "a/../0.png", "", "0.png/x"])
def test_imagefolder_names_that_are_no_file_of_the_folder_are_rejects(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(picture())
    (tmp_path / "in" / "0.png").write_bytes(picture())
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}) + "\n")
    counted = facts(tmp_path / "in")
    assert (counted["images"], counted["rejected"]) == (1, {"image_missing": 1})


def test_patterns_and_mixed_kinds(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"0.jpg": picture()})
    for at in range(3):
        (tmp_path / f"{at}.png").write_bytes(picture(at))
    assert facts(tmp_path)["images"] == 4
    assert facts(f"{tmp_path}/{{0..1}}.png")["images"] == 2
    assert facts(f"{tmp_path}/*.tar")["images"] == 1
    with pytest.raises(InputError, match=r"3\.png: no such file"):
        facts(f"{tmp_path}/{{0..3}}.png")


# --- tables -----------------------------------------------------------------------------------------------------------


def hugging_face(count: int = 5) -> pa.Table:
    image = [{"bytes": picture(at), "path": f"{at}.png"} for at in range(count)]
    return pa.table({"image": image, "text": [f"caption {at}" for at in range(count)]})


def test_rows_without_ids_have_their_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(hugging_face(), tmp_path / "data" / "train-0.parquet", row_group_size=2)
    found = rows(tmp_path)
    assert [row["reference_id"] for row in found] == [f"data/train-0/{at}" for at in range(5)]
    assert [row["caption"] for row in found] == [f"caption {at}" for at in range(5)]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_save_to_disk(tmp_path: Path, kind: str) -> None:
    table = hugging_face()
    path = str(tmp_path / "data-00000-of-00001.arrow")
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(path, "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (tmp_path / "state.json").write_text("{}")
    assert [row["caption"] for row in rows(tmp_path)] == [f"caption {at}" for at in range(5)]
    assert facts(tmp_path)["not_taken"] == ["state.json"]


def test_a_struct_of_paths_is_followed_inside_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    paths = ["a.png", "gone.png", "../secret.png", "/etc/passwd"]
    image = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet")
    found = rows(tmp_path / "x.parquet")
    assert [row["reason"] for row in found] == [None, *["image_missing"] * 3]
    assert "gone.png is not there" in found[1]["message"]


def test_columns_that_are_named(tmp_path: Path) -> None:
    table = pa.table({"name": ["a"], "pixels": [picture()], "words": ["w"], "from": ["u"]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"no image column.*index\.image_column"):
        rows(tmp_path)
    named = {"id_column": "name", "image_column": "pixels", "caption_column": "words", "url_column": "from"}
    (found,) = rows(tmp_path, **named)
    assert [found[key] for key in ("reference_id", "caption", "url")] == ["a", "w", "u"]
    with pytest.raises(InputError, match="no column 'nome'"):
        rows(tmp_path, **{**named, "id_column": "nome"})


def test_vectors_whose_images_are_not_there(tmp_path: Path) -> None:
    np.save(tmp_path / "img_emb_0.npy", np.ones((3, 4), np.float16))
    (tmp_path / "images").mkdir()

    def look(**options: Any) -> None:
        check_images(configured_source(IndexConfig(source=str(tmp_path), **options)))

    pq.write_table(pa.table({"caption": ["a", "b", "c"]}), tmp_path / "metadata_0.parquet")
    with pytest.raises(InputError, match="names no images"):
        look()
    pq.write_table(pa.table({"image_path": ["0.png", "1.png", "2.png"]}), tmp_path / "metadata_0.parquet")
    with pytest.raises(InputError, match=r"not one of the first 3 images.*0\.png; set index\.image_root"):
        look()
    (tmp_path / "images" / "2.png").write_bytes(picture())
    look(image_root=str(tmp_path / "images"))


# --- pixels that are whole --------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes, crc: bytes = b"\x00\x00\x00\x00") -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + crc


@pytest.mark.parametrize("kind", [b"tEXt", b"gAMA", b"iCCP", b"tIME", b"eXIf"])
def test_a_png_with_damaged_metadata_is_taken(kind: bytes) -> None:
    plain = picture(3)
    spoilt = plain[:33] + chunk(kind, b"x" * 20) + plain[33:]
    np.testing.assert_array_equal(decode(spoilt), decode(plain))


def test_a_png_with_much_text_is_taken() -> None:
    facts = PngImagePlugin.PngInfo()
    for at in range(3):
        facts.add_text(f"k{at}", "x" * (1 << 20) + "y", zip=at > 0)
    out = io.BytesIO()
    Image.fromarray(decode(picture(4))).save(out, "PNG", pnginfo=facts)
    np.testing.assert_array_equal(decode(out.getvalue()), decode(picture(4)))


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.array([[0, 0.5, 1]], np.float32), 1),
        (np.array([[26, 100, 235]], np.float32), 255),
        (np.array([[26, 100, 235]], np.int32), 255),
        (np.array([[0, 300, 65535]], np.int32), 65535),
        (np.array([[0.5, 2, 3]], np.float32), None),
        (np.array([[-1, 0, 1]], np.float32), None),
        (np.array([[0, 1, 70000]], np.int32), None),
        (np.array([[0, 1, 1]], np.int32), None),
    ],
)
def test_deep_greyscale_has_the_white_that_its_values_say(values: np.ndarray, white: float | None) -> None:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    if white is None:
        with pytest.raises(RowReject, match="which value is white is not known"):
            decode(out.getvalue())
    else:
        expected = np.rint(values.astype(np.float64) * 255 / white)
        np.testing.assert_array_equal(decode(out.getvalue())[..., 0], expected)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not here")
@pytest.mark.parametrize("name", [path.name for path in sorted((CASES / "images").glob("*"))])
def test_the_images(name: str) -> None:
    assert 20 < decode((CASES / "images" / name).read_bytes()).mean() < 235


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not here")
@pytest.mark.parametrize(
    ("name", "expected", "not_taken"),
    [
        ("wds_web", 8, 0),
        ("wds_mac", 3, 6),
        ("two_sets", 12, 0),
        ("i2d_files", 2, 2),
        ("imgfolder", 2, None),
        ("mixed_kinds", 3, 0),
        ("hf_noid", 3, 0),
        ("wds_sur", 2, 0),
        ("hf_struct", r"column image is struct<src.*not encoded images", None),
        ("hf_captstruct", "column caption is struct<en: string>, not text", None),
        ("clip_wds", "not one of the first 6 images.*000000000", None),
    ],
)
def test_the_references(name: str, expected: int | str, not_taken: int | None) -> None:
    path = str(CASES / "references" / name)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            inspect_paths([path], {}, {}, kind="references")
        return
    found = inspect_paths([path], {}, {})
    assert (found["kind"], found["images"], found["rejected"]) == ("references", expected, {})
    assert not_taken in (None, found["not_taken_count"])
    if name not in ("mixed_kinds", "two_sets"):
        assert all(example["caption"] for example in found["examples"])
    if name == "imgfolder":
        assert "train/Thumbs.db" in found["not_taken"]
