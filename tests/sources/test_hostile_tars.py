"""Tars whose headers lie: every sample is a row or a reject, and none takes memory that it does not fill."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.io.images import MAX_BYTES
from memscan.sources.webdataset import MAX_TEXT, read_tar


def rows(path: Path) -> list[dict[str, object]]:
    return [row for batch in read_tar(str(path), "t.tar", 64) for row in batch]


def tar_of(members: dict[str, bytes], **options: object) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {str(key): str(value) for key, value in options.items()}
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@given(st.binary(min_size=1, max_size=64), st.integers(0, 3000))
def test_whatever_is_written_into_headers_is_a_reject_and_no_traceback(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    data = bytearray(tar_of({"a.png": b"1", "b.png": b"2"}, comment="x" * 40))
    data[at : at + len(noise)] = noise
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    path.write_bytes(bytes(data))
    for row in rows(path):
        assert row.get("reason") or "image" in row


@pytest.mark.parametrize(
    "headers",
    [
        {"size": "-1"},
        {"size": "x"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.map": "a,b"},
        {"GNU.sparse.map": "0,1,9", "GNU.sparse.size": "z"},
        {"mtime": "nan("},
    ],
)
def test_rubbish_in_pax_headers_ends_no_build(tmp_path: Path, headers: dict[str, str]) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_of({"a.png": b"1"}, **headers) + tar_of({"b.png": b"2"}))
    found = rows(path)
    assert found
    assert all(row.get("reason") or "image" in row for row in found)


def test_a_member_with_holes_is_not_filled(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}
    path.write_bytes(tar_of({f"{at}.png": b"x" for at in range(200)}, **sparse))
    found = rows(path)
    assert [row["reason"] for row in found if row.get("reason")] == ["image_too_large"] * 200


def test_text_is_read_up_to_a_bound_and_its_case_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_of({"a.png": b"1", "a.TXT": b"w" * (MAX_TEXT + 5)}))
    (row,) = rows(path)
    assert len(str(row["caption"])) == MAX_TEXT
    assert MAX_TEXT < MAX_BYTES
