"""Reference index: against brute force, and against every kind of damage."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from memscan.errors import IndexLoadError, InputError, IntegrityError, MemscanError, Reason, RowReject
from memscan.index import Manifest, ReferenceIndex, nearest_whole, write_index
from memscan.index import vectors as faiss_vectors
from memscan.index.manifest import describe
from memscan.index.references import ReferenceStore, write_references
from memscan.io import images
from memscan.models.specification import ModelSpec
from memscan.records import REFERENCES, REGIONS

EMBEDDER = ModelSpec("embedder", "planted", "ab" * 32, "square64")
OTHER = ModelSpec("embedder", "sscd", "cd" * 32, "small_edge288")
SEGMENTER = ModelSpec("segmenter", "planted", "ef" * 32, "square64")
COUNT, DIMENSION = 300, 16
SHARD = "shards/00000"


def _unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _table(count: int) -> pa.Table:
    rng = np.random.default_rng(count)
    rows = []
    for row in range(count):
        image = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        mask = rng.integers(0, 2, (6, 5)).astype(np.float32)
        rows.append(
            {
                "reference_id": f"ref-{row:04d}",
                "caption": f"caption {row}" if row % 2 else None,
                "url": None,
                "image": images.encode_png(image),
                "mask": images.encode_mask(mask),
                "path": None,
            }
        )
    return pa.Table.from_pylist(rows, schema=REFERENCES)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return _table(COUNT)


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """Unit vectors by region with groups of exact duplicates, as repeated training images give."""
    rng = np.random.default_rng(0)
    made = {region: _unit(rng, COUNT) for region in REGIONS}
    for region in REGIONS:
        made[region][200:240] = made[region][7]
        made[region][250:253] = made[region][90]
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, table: pa.Table, vectors: dict[str, np.ndarray]) -> str:
    path = str(tmp_path_factory.mktemp("index") / "flat")
    write_index(path, table, vectors, "Flat", 4, EMBEDDER, SEGMENTER)
    return path


@pytest.fixture
def copy(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _brute_force(stored: np.ndarray, query: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Best k rows by cosine, ties by row; float64, with equal vectors given equal similarity."""
    similarity = np.round(stored.astype(np.float64) @ query.astype(np.float64), 9)
    rows = np.lexsort((np.arange(len(stored)), -similarity))[:k]
    return [(int(row), float(similarity[row])) for row in rows]


@pytest.mark.parametrize("k", [1, 5, 20, COUNT, COUNT + 50])
def test_search_equals_brute_force_with_ties_by_row(folder: str, vectors: dict[str, np.ndarray], k: int) -> None:
    index = ReferenceIndex.open(folder, EMBEDDER)
    rng = np.random.default_rng(1)
    queries = {region: np.concatenate([_unit(rng, 6), vectors[region][[7, 90, 230]]]) for region in REGIONS}
    answers = index.search(queries, k)
    assert len(answers) == 9
    for query, hits in enumerate(answers):
        expected: dict[int, dict[str, float]] = {}
        for region in REGIONS:
            for row, similarity in _brute_force(vectors[region], queries[region][query], k):
                expected.setdefault(row, {})[region] = similarity
        assert {hit.row: hit.found_by for hit in hits} == {row: "+".join(found) for row, found in expected.items()}
        for hit in hits:
            assert hit.reference_id == f"ref-{hit.row:04d}"
            assert hit.similarities == pytest.approx(expected[hit.row], abs=1e-5)
            assert hit.similarity == max(hit.similarities.values())
        best = [max(expected[hit.row].values()) for hit in hits]
        for i in range(len(hits) - 1):
            assert best[i] >= best[i + 1] - 2e-6  # single precision
            assert best[i] != best[i + 1] or hits[i].row < hits[i + 1].row
        whole = max(found["whole"] for found in expected.values() if "whole" in found)
        assert nearest_whole(hits) == pytest.approx(whole, abs=1e-5)


def test_a_query_alone_gets_what_it_gets_in_a_batch(folder: str, vectors: dict[str, np.ndarray]) -> None:
    index = ReferenceIndex.open(folder, EMBEDDER)
    new = _unit(np.random.default_rng(3), 40)
    queries = {region: np.concatenate([vectors[region][:40], new]) for region in REGIONS}
    together = index.search(queries, 5)
    for row in (0, 7, 39, 79):
        alone = index.search({region: queries[region][row : row + 1] for region in REGIONS}, 5)[0]
        assert [(hit.row, hit.found_by) for hit in alone] == [(hit.row, hit.found_by) for hit in together[row]]


def test_one_region_can_be_searched_alone(folder: str, vectors: dict[str, np.ndarray]) -> None:
    hits = ReferenceIndex.open(folder, EMBEDDER).search({"foreground": vectors["foreground"][90:91]}, 4)[0]
    assert [hit.row for hit in hits][:3] == [90, 250, 251]
    assert {hit.found_by for hit in hits} == {"foreground"}
    assert nearest_whole(hits) == -1


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW16"])
def test_other_factories_find_the_stored_vector(
    tmp_path: Path, table: pa.Table, vectors: dict[str, np.ndarray], factory: str
) -> None:
    folder = str(tmp_path / "index")
    manifest = write_index(folder, table, vectors, factory, 2, EMBEDDER, SEGMENTER)
    assert (manifest.factory, manifest.count, manifest.dimension) == (factory, COUNT, DIMENSION)
    index = ReferenceIndex.open(folder, EMBEDDER)
    for row in (0, 90, 299):
        hits = index.search({region: vectors[region][row : row + 1] for region in REGIONS}, 3)[0]
        assert (hits[0].row, hits[0].found_by) == (row, "whole+foreground+background")
        assert hits[0].similarity == pytest.approx(1, abs=1e-5)


def test_all_lists_of_an_ivf_index_equal_brute_force(
    tmp_path: Path, table: pa.Table, vectors: dict[str, np.ndarray]
) -> None:
    folder = str(tmp_path / "index")
    write_index(folder, table, vectors, "IVF8,Flat", 1, EMBEDDER, SEGMENTER)
    query = _unit(np.random.default_rng(8), 5)
    wide = ReferenceIndex.open(folder, EMBEDDER, nprobe=8).search({"whole": query}, 10)
    narrow = ReferenceIndex.open(folder, EMBEDDER).search({"whole": query}, 200)
    for row in range(5):
        assert [hit.row for hit in wide[row]] == [found for found, _ in _brute_force(vectors["whole"], query[row], 10)]
    assert min(len(hits) for hits in narrow) < 200  # one list of eight holds fewer: what is not there is not made up
    assert all(hit.row >= 0 for hits in narrow for hit in hits)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_the_same_input_gives_the_same_files(
    tmp_path: Path, table: pa.Table, vectors: dict[str, np.ndarray], factory: str
) -> None:
    first = write_index(str(tmp_path / "a"), table, vectors, factory, 4, EMBEDDER, SEGMENTER)
    second = write_index(str(tmp_path / "b"), table, vectors, factory, 4, EMBEDDER, SEGMENTER)
    assert first == second == Manifest.load(str(tmp_path / "a"))
    assert first.hash == second.hash != dataclasses.replace(first, nprobe=5).hash


def test_references_come_back_by_row(folder: str, table: pa.Table) -> None:
    index, store = ReferenceIndex.open(folder, EMBEDDER), ReferenceStore(f"{folder}/{SHARD}/references.parquet")
    for row in (0, 63, 64, 130, COUNT - 1):
        reference, stored = index.fetch(row), table.slice(row, 1).to_pylist()[0]
        assert (reference.reference_id, reference.caption, reference.url) == (
            stored["reference_id"],
            stored["caption"],
            None,
        )
        np.testing.assert_array_equal(reference.image_HWC, images.decode(stored["image"]))
        np.testing.assert_array_equal(reference.mask_HW, images.decode_mask(stored["mask"]))
        assert store.row_of(reference.reference_id) == row
        assert store.encoded(row) == stored
    for row in (-1, COUNT):
        with pytest.raises(IndexError, match=f"row {row} of {COUNT}"):
            index.fetch(row)
    with pytest.raises(RowReject, match="reference_missing"):
        store.row_of("ref-9999")


def test_row_groups_in_memory_are_bounded(folder: str) -> None:
    store = ReferenceStore(f"{folder}/{SHARD}/references.parquet", cached_groups=2)
    first = [store.fetch(row).reference_id for row in (0, 64, 128, 192, 256, 0)]
    assert first == ["ref-0000", "ref-0064", "ref-0128", "ref-0192", "ref-0256", "ref-0000"]
    assert len(store._groups) == 2


@pytest.mark.parametrize(
    ("column", "value"),
    [("image", b""), ("mask", b""), ("image", b"\xff\xd8 no image"), ("mask", images.encode_mask(np.ones((3, 3))))],
)
def test_a_reference_that_cannot_be_compared_is_a_reject(tmp_path: Path, column: str, value: bytes) -> None:
    rows = _table(3).to_pylist()
    rows[1][column] = value
    path = str(tmp_path / "references.parquet")
    write_references(path, [pa.Table.from_pylist(rows, schema=REFERENCES)])
    store = ReferenceStore(path)
    assert store.fetch(0).reference_id == "ref-0000"
    with pytest.raises(RowReject) as caught:
        store.fetch(1)
    assert caught.value.reason is Reason.REFERENCE_MISSING
    assert "ref-0001" in caught.value.message


@pytest.mark.parametrize("name", ["whole.faiss", "foreground.faiss", "background.faiss", "references.parquet"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damage_is_found_before_anything_is_parsed(
    copy: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy / SHARD / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-7] if damage == "truncated" else data)

    def parse(*_: object) -> None:
        raise AssertionError("parsed before it was verified")

    monkeypatch.setattr(faiss_vectors, "read", parse)
    monkeypatch.setattr("memscan.index.shards.ReferenceStore", parse)
    words = {"missing": "is missing", "truncated": "bytes, but the manifest says", "altered": "sha256 is"}
    with pytest.raises(IntegrityError, match=words[damage]) as caught:
        ReferenceIndex.open(str(copy), EMBEDDER)
    assert caught.value.where == str(path)


def test_sizes_alone_are_checked_where_asked(copy: Path) -> None:
    assert len(ReferenceIndex.open(str(copy), EMBEDDER, verify="size")) == COUNT
    (copy / SHARD / "whole.faiss").write_bytes(b"short")
    with pytest.raises(IntegrityError, match="5 bytes"):
        ReferenceIndex.open(str(copy), EMBEDDER, verify="size")


def test_an_index_of_another_embedder_is_refused_naming_both(folder: str) -> None:
    with pytest.raises(IndexLoadError) as caught:
        ReferenceIndex.open(folder, OTHER)
    assert EMBEDDER.id in str(caught.value)
    assert OTHER.id in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no index here"),
        ("{", "not valid JSON"),
        ("[]", "not an index manifest"),
        ('{"format": 9}', "index format 9"),
        ('{"format": 2, "shards": [{}]}', "not an index manifest"),
    ],
)
def test_a_folder_without_a_sound_manifest_is_no_index(copy: Path, text: str | None, message: str) -> None:
    path = copy / "manifest.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(IndexLoadError, match=message):
        ReferenceIndex.open(str(copy), EMBEDDER)


def test_parts_of_different_sizes_are_refused(copy: Path, vectors: dict[str, np.ndarray]) -> None:
    """Hashes that hold do not help where the parts were never one index."""
    template = faiss_vectors.train(vectors["whole"], "Flat")
    path = str(copy / SHARD / "whole.faiss")
    faiss_vectors.write(path, faiss_vectors.filled(template, vectors["whole"][:100]))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["files"]["whole.faiss"] = dataclasses.asdict(describe(path))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexLoadError, match="whole holds 100 rows, the manifest says 300"):
        ReferenceIndex.open(str(copy), EMBEDDER)


def test_a_build_that_breaks_off_leaves_no_index(
    copy: Path, table: pa.Table, vectors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(faiss_vectors, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_index(str(copy), table, vectors, "Flat", 4, EMBEDDER, SEGMENTER)
    with pytest.raises(IndexLoadError, match="no index here"):
        ReferenceIndex.open(str(copy), EMBEDDER)


def test_wrong_input_of_a_build(tmp_path: Path, table: pa.Table, vectors: dict[str, np.ndarray]) -> None:
    folder = str(tmp_path / "index")

    def build(rows: pa.Table, made: dict[str, np.ndarray], factory: str = "Flat") -> None:
        write_index(folder, rows, made, factory, 4, EMBEDDER, SEGMENTER)

    with pytest.raises(InputError, match="Nonsense7"):
        build(table, vectors, "Nonsense7")
    with pytest.raises(InputError, match="IVF4096"):
        build(table, vectors, "IVF4096,Flat")
    with pytest.raises(InputError, match="occurs 2 times"):
        build(pa.concat_tables([table.slice(0, COUNT - 1), table.slice(0, 1)]), vectors)
    with pytest.raises(InputError, match="no reference images"):
        build(table.slice(0, 0), {region: np.zeros((0, DIMENSION), np.float32) for region in REGIONS})
    with pytest.raises(InputError, match="schema"):
        build(table.drop_columns(["url"]), vectors)
    with pytest.raises(ValueError, match="expected"):
        build(table, {"left": vectors["whole"]})
    with pytest.raises(ValueError, match="for 10 references"):
        build(table.slice(0, 10), vectors)
    broken = vectors["whole"].copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="whole vector of row 3 has length nan"):
        build(table, {**vectors, "whole": broken})
    with pytest.raises(ValueError, match="row 0 has length 2"):
        build(table, {**vectors, "background": 2 * vectors["background"]})


def test_a_remote_index_reads_as_a_local_one(
    table: pa.Table,
    vectors: dict[str, np.ndarray],
    folder: str,
    s3: Any,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = f"{s3_bucket}/index"
    manifest = write_index(remote, table, vectors, "Flat", 4, EMBEDDER, SEGMENTER)
    assert manifest == Manifest.load(folder)
    far, near = ReferenceIndex.open(remote, EMBEDDER), ReferenceIndex.open(folder, EMBEDDER)
    queries = {region: vectors[region][:20] for region in REGIONS}
    assert far.search(queries, 5) == near.search(queries, 5)
    np.testing.assert_array_equal(far.fetch(70).image_HWC, near.fetch(70).image_HWC)
    monkeypatch.setenv("MEMSCAN_CACHE", f"{folder}-another-machine")
    s3.pipe_file(f"{remote}/{SHARD}/foreground.faiss", b"")
    with pytest.raises(IntegrityError, match=r"s3://.*/foreground\.faiss: 0 bytes"):
        ReferenceIndex.open(remote, EMBEDDER)


def test_wrong_queries_are_refused(folder: str, vectors: dict[str, np.ndarray]) -> None:
    index = ReferenceIndex.open(folder, EMBEDDER)
    query = vectors["whole"][:2]
    for wrong in ({}, {"left": query}, {"whole": query[:, :8]}, {"whole": query, "foreground": query[:1]}):
        with pytest.raises(ValueError, match=r"search regions|queries of shapes|has length"):
            index.search(wrong, 3)
    with pytest.raises(ValueError, match="top_k 0"):
        index.search({"whole": query}, 0)
    assert index.search({"whole": query[:0]}, 3) == []


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MemscanError, match="pip install faiss-cpu"):
        faiss_vectors.load_faiss()


def test_importing_the_package_does_not_import_faiss() -> None:
    code = "import sys, memscan.index; sys.exit('faiss' in sys.modules or 'ray' in sys.modules)"
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
