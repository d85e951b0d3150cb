"""This module removes secrets from text before it is shown or written.

Secrets are credentials in addresses, and what signs a request.

Paths and addresses end up in messages, run.json and reports, which are passed on. An address may carry credentials
(`https://user:password@host`, `s3://KEY:SECRET@bucket`) or a signature that is as good as one (presigned URLs); a
library's message may repeat the value of a secret variable of the environment.
"""

from __future__ import annotations

import functools
import json
import os
import re
from urllib.parse import quote, quote_plus

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/\s@\"'<>?#]+@")
_SIGNED = re.compile(
    r"(?<=[?&;])(X-Amz-(?:Credential|Signature|Security-Token)|AWSAccessKeyId|Signature|sig|"
    r"(?:access|auth|api|refresh|id|hf)?_?(?:token|key)|apikey|secret|password|passwd|pwd)=[^&;#\s\"'<>]+",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"(?<=\bBearer )[\w.~+/=-]+|(?<=\bBasic )[\w+/=-]{8,}|\bhf_[A-Za-z0-9]{16,}\b|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    re.IGNORECASE,
)
# Whole words of a variable's name; AUTH, KEY, PAT and WEBHOOK at its end only (SSH_AUTH_SOCK is a path).
_SECRET_NAME = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PWD_?HASH|PASSPHRASE|PASSCODE|CREDENTIALS?|CREDS?|API_?KEY"
    r"|ACCESS_KEY(_ID)?|PRIVATE_KEY|SIGNING_KEY|ACCOUNT_KEY|CONNECTION_STRING|DSN)($|_)"
    r"|(^|_)[A-Z0-9]*(KEY|AUTH|PAT|WEBHOOK|WEBHOOK_URL)$",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8  # a shorter value is a word that stands in messages anyway


def redact(text: str) -> str:
    """Return the text with every credential of an address, a header or a secret variable replaced by `***`."""
    for name, value in os.environ.items():
        if len(value.strip()) >= _SHORTEST_SECRET and _is_secret(name):
            for form in _forms(value):
                text = text.replace(form, HIDDEN)
    if "://" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
        text = _SIGNED.sub(lambda found: f"{found[1]}={HIDDEN}", text)
    return _BEARER.sub(HIDDEN, text)


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


@functools.lru_cache(maxsize=256)
def _forms(value: str) -> tuple[str, ...]:
    """A value as it is, without white space around it, and as JSON, Python and addresses write it; longest first."""
    bare = value.strip()
    forms = {value, bare}
    for one in (value, bare):
        forms |= {json.dumps(one)[1:-1], json.dumps(one, ensure_ascii=False)[1:-1], repr(one)[1:-1]}
        forms |= {quote(one), quote(one, safe=""), quote_plus(one)}
    return tuple(sorted(forms, key=len, reverse=True))
