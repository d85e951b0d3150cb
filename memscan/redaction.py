"""Secrets taken out of text before it is shown or written: credentials in addresses, and what signs a request.

Paths and addresses end up in messages, run.json and reports, which are passed on. An address may carry credentials
(`https://user:password@host`, `s3://KEY:SECRET@bucket`) or a signature that is as good as one (presigned URLs); a
library's message may repeat the value of a secret variable of the environment.
"""

from __future__ import annotations

import os
import re

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
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY(_ID)?)($|_)", re.IGNORECASE
)
_SHORTEST_SECRET = 8  # a shorter value is a word that stands in messages anyway


def redact(text: str) -> str:
    """The text with every credential that an address, a header or a secret variable gave it replaced by `***`."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
        text = _SIGNED.sub(lambda found: f"{found[1]}={HIDDEN}", text)
    return _BEARER.sub(HIDDEN, text)
