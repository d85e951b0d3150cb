"""What a nightly tells: delivery never decides anything, and no cell is a formula."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.census.flagged import neutralise
from memscan.census.policy import WebhookConfig
from memscan.errors import ConfigError
from pipelines.nightly.publish import address, post

WEBHOOK = WebhookConfig(url_env="HOOK", token_env="HOOK_TOKEN", timeout_seconds=2)
SECRET = "s3cr3t-path-4711"


@pytest.fixture
def answering() -> Iterator[list[bytes]]:
    """A server that gives the bytes of a list, and no HTTP where they are none."""
    answers: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(answers[-1])

    threading.Thread(target=serve, daemon=True).start()
    answers.append(str(server.getsockname()[1]).encode())
    yield answers
    server.close()


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-server\r\n", b"HTTP/9 x y\r\n\r\n", b"\0" * 70000, b"HTTP/1.1 500 no\r\n\r\n"]
)
def test_whatever_a_server_answers_is_one_redacted_line(
    answering: list[bytes], answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{int(answering[0])}/{SECRET}")
    monkeypatch.setenv("HOOK_TOKEN", "token-with-a-line-end\n")
    answering.append(answer)
    said = post(WEBHOOK, {"state": "passed"})
    assert said.startswith(("not delivered (", "answered 500"))
    assert SECRET not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "url", ["http://h/\x07", "http://h/a b", "http://[::1", "http://h:99999/", "ftp://h/", "", "http:///"]
)
def test_an_address_that_is_none_is_told_without_being_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", url + (SECRET if url else ""))
    with pytest.raises(ConfigError, match="HOOK holds no http") as caught:
        address(WEBHOOK)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "before", ["", " ", "\v", "\f", "\0", "\u2003", "\u3000", "\u200b", "\ufeff", "\t", "\u061c", "\v \u3000"]
)
@pytest.mark.parametrize("sign", "=+-@\uff1d\uff0b\uff0d\uff20")
def test_no_cell_is_a_formula(before: str, sign: str) -> None:
    assert neutralise(f"{before}{sign}1+1") == f"'{before}{sign}1+1"


@given(st.text())
def test_a_cell_is_its_text_or_its_text_behind_an_apostrophe(text: str) -> None:
    assert neutralise(text) in (text, f"'{text}")
