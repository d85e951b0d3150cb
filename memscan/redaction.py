"""Secrets taken out of text before it is shown or written: credentials in addresses, and what signs a request.

Paths and addresses end up in messages, run.json and reports, which are passed on. An address may carry credentials
(`https://user:password@host`, `s3://KEY:SECRET@bucket`) or a signature that is as good as one (presigned URLs).
"""

from __future__ import annotations

import re

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/\s@\"'<>?#]+@")
_SIGNED = re.compile(
    r"(?<=[?&;])(X-Amz-(?:Credential|Signature|Security-Token)|AWSAccessKeyId|Signature|sig|"
    r"(?:access|auth|api|refresh|id|hf)?_?(?:token|key)|apikey|secret|password|passwd|pwd)=[^&;#\s\"'<>]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?<=\bBearer )[\w.~+/=-]+|\bhf_[A-Za-z0-9]{16,}\b", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with every credential that an address or a header in it carries replaced by `***`."""
    if "://" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
        text = _SIGNED.sub(lambda found: f"{found[1]}={HIDDEN}", text)
    return _BEARER.sub(HIDDEN, text)
