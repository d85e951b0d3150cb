"""This module configures the S3 client of `storage`: how often it tries, and how long it waits.

Under load, S3 answers 503, drops connections and truncates answers. A request is tried `ATTEMPTS` times with growing,
random pauses (botocore's standard mode: 1, 2, 4, ... at most 20 s, each times a random number). An answer that breaks
off while it is read is requested again `ROUNDS` times. So is one that is damaged, is not from S3, or is not complete in
time (`s3_answers.py`). The time is ANSWER_SECONDS, retries included, plus one second for each SLOWEST_BYTES. A server
that never answers is given up after ANSWER_SECONDS x ROUNDS, which is ten minutes. Then one line says so (`remote.py`).
"""

from __future__ import annotations

import os
from typing import Any

ATTEMPTS = 6
ROUNDS = 5
CONNECT_SECONDS = 10
READ_SECONDS = 20
ANSWER_SECONDS = 120.0
SLOWEST_BYTES = 100_000


def deadline(size: int) -> float:
    """Return the seconds within which an answer, or a request, of this number of bytes must be complete."""
    return ANSWER_SECONDS + size / SLOWEST_BYTES


def client() -> Any:
    """Return an s3fs file system with the credentials and the endpoint that AWS's own variables and files name.

    AWS_MAX_ATTEMPTS and AWS_RETRY_MODE count where they are set. Raises ImportError if s3fs is not installed.
    """
    import s3fs  # noqa: F401 - to be missed here, by its name

    from memscan.io.s3_answers import S3Files

    settings: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        settings["retries"] = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    # Without the listings cache: other processes add files to a run while this one looks at it.
    made = S3Files(use_listings_cache=False, config_kwargs=settings)
    made.retries = ROUNDS
    return made
