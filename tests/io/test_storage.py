from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memscan.errors import InputError, IntegrityError, MemscanError
from memscan.io import remote, storage

pytestmark = pytest.mark.waits


@pytest.fixture(params=["local", "s3", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on a disk, on S3, and in a store that is neither."""
    if request.param == "local":
        return str(tmp_path / "folder")
    if request.param == "memory":
        return f"memory://{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}/folder"
    bucket = f"bucket-{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"
    request.getfixturevalue("s3").mkdir(bucket)
    return f"s3://{bucket}/folder"


def test_of_two_creators_one_wins(base: str) -> None:
    path = storage.join(base, "new", "file.bin")
    if base.startswith("memory://"):
        with pytest.raises(MemscanError, match="inputs only: other processes do not see it"):
            storage.create_new(path, b"first")
        assert not storage.exists(path)
        return
    assert storage.create_new(path, b"first")
    assert not storage.create_new(path, b"second")
    assert storage.read_bytes(path) == b"first"


def test_write_read_replace(base: str) -> None:
    path = storage.join(base, "deep", "file.bin")
    assert not storage.exists(path)
    storage.write_atomic(path, b"first")
    storage.write_atomic(path, b"second")
    assert storage.exists(path)
    assert storage.read_bytes(path) == b"second"
    assert storage.file_size(path) == 6
    with storage.open_input(path) as file:
        file.seek(2)
        assert file.read() == b"cond"
    assert storage.list_files(base, ".bin") == [path]


def test_folders(base: str) -> None:
    for name in ["b.csv", "a.CSV", "part-0/c.csv", "part-0/d.txt", ".hidden.csv", ".private/e.csv"]:
        storage.write_atomic(storage.join(base, name), b"x")
    assert storage.is_dir(base)
    assert storage.is_dir(storage.join(base, "part-0"))
    assert not storage.is_dir(storage.join(base, "b.csv"))
    expected = [storage.join(base, name) for name in ["a.CSV", "b.csv", "part-0/c.csv"]]
    assert storage.list_files(base, [".csv"]) == expected
    storage.remove_tree(storage.join(base, "part-0"))
    assert not storage.exists(storage.join(base, "part-0"))
    storage.remove_tree(storage.join(base, "b.csv"))
    assert storage.list_files(base, (".csv", ".txt")) == expected[:1]
    storage.remove_tree(storage.join(base, "never-was"))


def test_json(base: str) -> None:
    path = storage.join(base, "run.json")
    storage.write_json(path, {"b": 1, "a": ["é", None]})
    assert storage.read_json(path) == {"b": 1, "a": ["é", None]}
    assert storage.read_bytes(path).decode("utf-8").index('"b"') < storage.read_bytes(path).decode("utf-8").index('"a"')
    with pytest.raises(ValueError, match="Out of range"):
        storage.write_json(path, {"a": float("nan")})
    storage.write_atomic(path, b'{"half": ')
    with pytest.raises(InputError, match=r"run\.json: is not valid JSON"):
        storage.read_json(path)


def test_hashes(base: str) -> None:
    path = storage.join(base, "weights.bin")
    content = bytes(range(256)) * 5000
    storage.write_atomic(path, content)
    digest = hashlib.sha256(content).hexdigest()
    assert storage.sha256_file(path) == digest
    storage.verify_sha256(path, digest.upper())
    with pytest.raises(IntegrityError, match=rf"weights\.bin: sha256 is {digest}, expected 00"):
        storage.verify_sha256(path, "00")


def test_arrow_takes_what_we_wrote(base: str) -> None:
    path = storage.join(base, "table.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2]}), sink)
    storage.write_atomic(path, sink.getvalue().to_pybytes())
    filesystem, inner = storage.arrow_filesystem(path)
    assert pq.read_table(inner, filesystem=filesystem)["a"].to_pylist() == [1, 2]


@pytest.mark.parametrize("call", [storage.read_bytes, storage.open_input, storage.sha256_file, storage.file_size])
def test_missing_file_is_one_line(base: str, call: object) -> None:
    storage.write_atomic(storage.join(base, "present"), b"")
    assert callable(call)
    with pytest.raises(InputError, match="no such file") as caught:
        call(storage.join(base, "absent"))
    assert "absent" in str(caught.value)


def test_missing_folder(base: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        storage.list_files(storage.join(base, "absent"), ".csv")


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "commit.json"
    storage.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemscanError, match=r"commit\.json: cannot write: No space left on device"):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["commit.json"]


def test_reading_a_folder_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        storage.read_bytes(tmp_path)


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_bytes(b"")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "data")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert len(storage.list_files(tmp_path / "root", ".csv")) == 1


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("a", "b", "c"), "a/b/c"),
        (("a/", "b"), "a/b"),
        (("/", "b"), "/b"),
        (("/",), "/"),
        (("a", "/etc"), "a/etc"),
        (("s3://bucket", "x", "y"), "s3://bucket/x/y"),
        (("s3://bucket/k/", "x"), "s3://bucket/k/x"),
        (("gs://", "x", "y"), "gs://x/y"),
        (("abfs://data@account.dfs.core.windows.net/k", "x"), "abfs://data@account.dfs.core.windows.net/k/x"),
        (("a", ""), "a"),
        (("", "a"), "a"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(*parts) == expected


def test_a_path_object_keeps_its_bucket() -> None:
    assert storage.join(Path("s3://bucket/key"), "x") == "s3://bucket/key/x"
    assert storage.is_remote(Path("s3://bucket"))


@pytest.mark.parametrize("path", ["http://host/key", "gsx://bucket/key", "file:///etc/passwd"])
def test_other_schemes_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="not supported"):
        storage.read_bytes(path)


@pytest.mark.parametrize("scheme", sorted(remote.STORES))
def test_every_scheme_survives_pathlib(scheme: str) -> None:
    assert storage.join(Path(f"{scheme}://place/key"), "x") == f"{scheme}://place/key/x"
    assert storage.is_remote(f"{scheme}://place/key")


@pytest.mark.parametrize(
    "path",
    [
        "s3://KEY:SECRET@bucket/x",
        "gs://user@bucket/x",
        "az://KEY:SECRET@account.dfs.core.windows.net/x",
        "az://container/x?sv=2026&sig=abc",
        "s3://bucket/x?X-Amz-Signature=abc",
        "hf://user:token@datasets/x",
    ],
)
def test_credentials_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="credentials do not belong"):
        storage.is_remote(path)


@pytest.mark.parametrize(
    ("path", "fit"),
    [
        ("runs/a", True),
        ("s3://b/a", True),
        ("gs://b/a", True),
        ("abfs://c/a", True),
        ("hf://datasets/o/n/a", False),
        ("memory://a", False),
    ],
)
def test_which_stores_are_fit_for_runs(path: str, fit: bool) -> None:
    if fit:
        storage.check_exclusive(path)
        return
    with pytest.raises(MemscanError, match="can be used for inputs only") as caught:
        storage.check_exclusive(path)
    assert "\n" not in str(caught.value)


def test_stamps_and_moves(base: str, tmp_path: Path) -> None:
    """A stamp is another one once the file is replaced; a file that is moved in is whole, and gone where it was."""
    (tmp_path / "made").write_bytes(b"x" * 10)
    storage.move_in(tmp_path / "made", storage.join(base, "deep", "moved"))
    assert not (tmp_path / "made").exists()
    before = storage.stamps(base)
    assert list(before) == ["deep/moved"]
    storage.write_atomic(storage.join(base, "deep", "moved"), b"y" * 10)
    assert storage.stamps(base) != before
    storage.fetch(storage.join(base, "deep", "moved"), tmp_path / "new" / "fetched")
    assert (tmp_path / "new" / "fetched").read_bytes() == b"y" * 10


@pytest.mark.parametrize("path", ["/", "s3://bucket", "s3://bucket/"])
def test_roots_are_never_removed(path: str) -> None:
    with pytest.raises(MemscanError, match="refusing"):
        storage.remove_tree(path)


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [("s3", "s3fs", "s3fs"), ("gs", "gcsfs", "gcsfs"), ("az", "adlfs", "adlfs"), ("abfs", "adlfs", "adlfs")],
)
def test_a_missing_driver_says_what_to_install(
    scheme: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MemscanError, match=f"pip install {package}") as caught:
        storage.read_bytes(f"{scheme}://bucket/key")
    assert "\n" not in str(caught.value)
