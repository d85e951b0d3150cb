"""Damaged sources of references: every row is read or a reject, or the source is refused in one line."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from memscan.sources.npy import read_header
from memscan.sources.reading import ChunkReader, open_source
from tests.fuzz.damage import one_line, spoilt

ROWS = 6


def a_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(ROWS):
            files = {"jpg": b"image", "txt": b"a caption", "json": b'{"url": "https://x/1"}'}
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def a_table() -> bytes:
    out = io.BytesIO()
    columns: dict[str, Any] = {"id": [f"{n}" for n in range(ROWS)], "image": [b"image"] * ROWS, "caption": ["c"] * ROWS}
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def vectors() -> bytes:
    out = io.BytesIO()
    np.save(out, np.ones((ROWS, 4), np.float32))
    return out.getvalue()


def read_all(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        if name.endswith(".npy"):
            shutil.copy(TABLE, Path(folder) / "metadata_0.parquet")
        source = one_line(lambda: open_source(folder))
        if source is None:
            return
        reader, rows = ChunkReader(source), 0
        for chunk in source.chunks().to_pylist():
            table = one_line(lambda chunk=chunk: reader.read(chunk))
            if table is None:
                return
            rows += len(table.to_pylist())
        assert source.rows in (None, rows)


GOOD = {"0.tar": a_tar(), "a.parquet": a_table(), "img_emb_0.npy": vectors()}
TABLE = Path(tempfile.mkdtemp(prefix="memscan-fuzz-")) / "metadata.parquet"


def setup_module() -> None:
    pq.write_table(pa.table({"caption": ["c"] * ROWS}), TABLE)
    read_header.cache_clear()


def teardown_module() -> None:
    shutil.rmtree(TABLE.parent)


def test_the_undamaged_sources_are_read() -> None:
    for name, content in GOOD.items():
        read_all(name, content)


@settings(max_examples=120)
@given(st.sampled_from(sorted(GOOD)).flatmap(lambda name: st.tuples(st.just(name), spoilt(GOOD[name]))))
def test_a_damaged_source(case: tuple[str, bytes]) -> None:
    read_all(*case)
