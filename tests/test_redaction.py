"""Credentials in text: found in addresses and headers, and gone from every message; other text stays as it is."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from memscan.errors import InputError, MemscanError, Reason, RowReject
from memscan.io import storage
from memscan.redaction import redact
from memscan.report.data import shown_url

HIDDEN = {
    "https://user:pass-word@host/path": "https://***@host/path",
    "s3://AKIAEXAMPLE:se/cret@bucket/key": "s3://AKIAEXAMPLE:se/cret@bucket/key",  # no address any more; see below
    "s3://AKIAEXAMPLE:secret@bucket/key": "s3://***@bucket/key",
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=ab12&x=1": (
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1"
    ),
    "https://h/i.jpg?width=9&token=abc&sig=def#top": "https://h/i.jpg?width=9&token=***&sig=***#top",
    "Authorization: Bearer abc.def-123": "Authorization: Bearer ***",
    "token hf_abcdefghijklmnopqrst was refused": "token *** was refused",
}
KEPT = ("a cat @ home, 3://4", "s3://bucket/key", "https://host/a@b.jpg?size=9", "mail me@example.org", "monkey=1")


@pytest.mark.parametrize(("text", "shown"), HIDDEN.items())
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("text", KEPT)
def test_other_text_is_kept(text: str) -> None:
    assert redact(text) == text


def test_no_message_holds_a_credential() -> None:
    url = "https://user:secret@host/x?token=secret"
    for error in (MemscanError(url, where=url, hint=url), RowReject(Reason.IMAGE_MISSING, url)):
        assert "secret" not in str(error)
        assert "host" in str(error)
    assert shown_url(url) == "https://***@host/x?token=***"
    assert shown_url(None) is None


@pytest.mark.parametrize("path", ["s3://KEY:secret@bucket/run", "https://user:secret@host/run"])
def test_a_path_with_credentials_is_refused_and_not_repeated(path: str) -> None:
    with pytest.raises(InputError, match="credentials do not belong in a path") as caught:
        storage.exists(path)
    assert "secret" not in str(caught.value)


INNER = ("a", "a/b.parquet", "shards/00000/whole.faiss", "..a/b..")
OUTER = ("", "/etc/passwd", "../a", "a/../../b", "a//b", "a/.", "a\\..\\b", "a\0b", "a/")


@pytest.mark.parametrize(("name", "inner"), [*((n, True) for n in INNER), *((n, False) for n in OUTER)])
def test_names_that_stay_in_their_folder(name: str, inner: bool) -> None:
    assert storage.is_inner(name) == inner


SECRET_NAMES = (
    "SSH_PRIVATE_KEY",
    "SIGNING_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "GPG_PASSPHRASE",
    "GITHUB_PAT",
    "SLACK_WEBHOOK",
)
SECRET_NAMES += (
    "AUTH",
    "REGISTRY_AUTH",
    "CREDS",
    "MY_CREDS",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
    "WEBHOOK_URL",
)
PLAIN_NAMES = (
    "PATH",
    "SSH_AUTH_SOCK",
    "KEYBOARD",
    "PATTERN",
    "AUTHOR",
    "HOME",
    "XDG_DATA_DIRS",
    "TOKENIZERS_PARALLELISM",
)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_hidden_however_it_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'a"b\\c /d+é=%x'
    monkeypatch.setenv(name, value + "\n")
    for form in (
        value,
        json.dumps(value),
        json.dumps({"v": value}, ensure_ascii=False),
        repr(value),
        quote(value, safe=""),
    ):
        shown = redact(f"it says {form} there")
        assert "/d+" not in shown.replace("%2F", "/").replace("%2B", "+"), shown


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_other_variables_are_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a plain value")
    assert redact("a plain value") == "a plain value"
