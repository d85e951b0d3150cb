"""S3 that answers 503, closes connections, says nothing, cuts answers short, drips, flips a bit or shows a page.

Each is tried again, and told in one line where it lasts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from memscan.errors import InputError, MemscanError, RunError
from memscan.io import s3 as client
from memscan.io import storage
from memscan.io.register import Register
from pipelines.run_folder import lease as leases
from pipelines.run_folder.tables import read_table, write_table
from tests.support.s3_proxy import Proxy

pytestmark = pytest.mark.waits

BUCKET = "s3://faulty"
DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def proxy(s3: Any) -> Iterator[Proxy]:
    """A proxy in front of the S3 server, which everybody uses; waiting times are those of a test."""
    pytest.importorskip("s3fs")
    from memscan.io.s3_answers import S3Files

    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    with Proxy(str(server.hostname), int(server.port or 0)) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        for name, value in {"ATTEMPTS": 2, "ROUNDS": 2, "READ_SECONDS": 1, "ANSWER_SECONDS": 2.0}.items():
            patch.setattr(client, name, value)
        S3Files.clear_instance_cache()
        client.client().mkdir("faulty")
        storage.write_atomic(f"{BUCKET}/data/object.bin", DATA)
        write_table(f"{BUCKET}/data/table.parquet", pa.table({"n": range(1000)}))
        yield made
    S3Files.clear_instance_cache()


def _read() -> bool:
    return storage.read_bytes(f"{BUCKET}/data/object.bin") == DATA


def _stream() -> bool:
    with storage.open_input(f"{BUCKET}/data/object.bin") as file:
        return file.read(500) + file.read() == DATA


def _arrow() -> bool:
    return bool(read_table(f"{BUCKET}/data/table.parquet").num_rows == 1000)


def _write() -> bool:
    storage.write_atomic(f"{BUCKET}/data/object.bin", DATA)
    return _read()


def _list() -> bool:
    return len(storage.list_files(f"{BUCKET}/data", ("",))) == 2


CALLS: dict[str, tuple[Callable[[], bool], str, str]] = {  # what is called, the requests to break, what an error names
    "read": (_read, "GET /faulty/data/object.bin", f"{BUCKET}/data/object.bin: cannot read"),
    "stream": (_stream, "GET /faulty/data/object.bin", f"{BUCKET}/data/object.bin: cannot read"),
    "arrow": (_arrow, "/faulty/data/table.parquet", f"{BUCKET}/data/table.parquet: cannot read"),
    "write": (_write, "PUT /faulty/data/object.bin", f"{BUCKET}/data/object.bin: cannot write"),
    "list": (_list, "list-type", f"{BUCKET}/data: cannot"),
}
BREAKABLE = [
    *(("503", call) for call in CALLS),
    ("reset", "read"),
    ("truncate", "read"),
    ("truncate", "arrow"),
    ("hang", "arrow"),
    ("hang", "write"),
    ("drip", "read"),
    ("drip", "list"),
    ("flip", "read"),
    ("flip", "arrow"),
    ("html", "read"),
    ("html", "write"),
    ("html", "list"),
    ("xhtml", "list"),
]


@pytest.mark.parametrize(("fault", "call"), BREAKABLE)
def test_a_passing_fault_is_not_noticed(proxy: Proxy, fault: str, call: str) -> None:
    work, word, _ = CALLS[call]
    proxy.break_next(fault, 1, word)
    assert work()
    assert proxy.broken == 1


@pytest.mark.parametrize(("fault", "call"), BREAKABLE)
def test_a_lasting_fault_is_one_line_that_names_the_object(proxy: Proxy, fault: str, call: str) -> None:
    work, word, named = CALLS[call]
    proxy.break_next(fault, 1000, word)
    with pytest.raises(MemscanError) as caught:
        work()
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)
    assert 1 < proxy.broken < 60  # the HTTP library tries a closed connection some times more
    assert isinstance(caught.value, InputError) == (call != "write")
    proxy.break_next("", 0, "")
    assert work()


def test_a_slow_answer_is_waited_for(proxy: Proxy) -> None:
    proxy.break_next("slow", 3, "object.bin")
    assert _read()
    assert proxy.broken


def test_a_copy_that_breaks_off_leaves_nothing(proxy: Proxy, tmp_path: Path) -> None:
    proxy.break_next("truncate", 1000, "GET /faulty/data/object.bin")
    with pytest.raises(InputError, match=r"object\.bin: cannot read"):
        storage.fetch(f"{BUCKET}/data/object.bin", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_an_object_that_is_not_there_is_not_waited_for(proxy: Proxy) -> None:
    proxy.break_next("", 0, "")
    with pytest.raises(InputError, match="no such file"):
        storage.read_bytes(f"{BUCKET}/data/never")
    assert proxy.requests < 5


@pytest.mark.parametrize("times", [1, 2])
def test_a_lease_whose_put_was_answered_by_nobody_is_ours(proxy: Proxy, times: int) -> None:
    """The put was done and the answer lost: the next try finds a file, which is its own."""
    folder = f"{BUCKET}/run-{times}/lease"
    proxy.break_next("lost", times, "PUT /faulty/run-")
    lease = leases.take(folder)
    assert (lease.epoch, proxy.broken) == (1, times)
    lease.check()
    proxy.break_next("lost", times, "PUT /faulty/run-")
    lease.renew()
    with pytest.raises(RunError, match="is being worked on by process"):
        leases.take(folder)
    proxy.break_next("lost", times, "PUT /faulty/run-")
    lease.release()
    assert leases.take(folder).epoch == 2


def test_a_put_that_is_lost_for_good_leaves_a_lease_that_the_same_machine_takes_again(proxy: Proxy) -> None:
    folder = f"{BUCKET}/run-lost/lease"
    proxy.break_next("lost", 1000, "PUT /faulty/run-lost")
    with pytest.raises(MemscanError, match="cannot write"):
        leases.take(folder)
    proxy.break_next("", 0, "")
    file = Register(folder).file(1)
    storage.write_json(file, {**storage.read_json(file), "pid": 2**22 + 1})  # that command has ended meanwhile
    assert leases.take(folder).epoch == 2


def test_a_store_whose_etags_are_no_hashes_is_read_all_the_same(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3 Express: the same bytes come twice, so nothing flipped on the way."""
    monkeypatch.setattr("memscan.io.s3_answers._md5_of", lambda answer: "0" * 32)
    proxy.break_next("", 0, "GET /faulty/data/object.bin")
    assert _read()
    assert proxy.requests == 2
    assert _read()
    assert proxy.requests == 3
