"""This module writes structured logs: one JSON object per line, always with the same first fields.

    {"time": "2026-11-25T19:04:11.482Z", "level": "info", "run": "sd14", "stage": "commit", "part": 3,
     "message": "part committed", "rows": 10000, "done": 9998, ...}

A run's events are in RUN/logs/memscan.jsonl, with what Ray's loggers warn of. `memscan --log-format json` writes what a
command says to standard error in the same form, for collectors that read a container's output. Texts are redacted:
values of secret variables, passwords in addresses, signatures of signed URLs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from memscan.redaction import redact

FILE = "memscan.jsonl"


class LogFormat(str, Enum):
    """This is the format in which a command writes to standard error."""

    TEXT = "text"
    JSON = "json"


class _Voice:
    """Of this process: the format of standard error, and the run that is being worked on."""

    format = LogFormat.TEXT
    run: str | None = None


def speak(form: LogFormat) -> None:
    """Choose how this process speaks on standard error."""
    _Voice.format = form


def speaks_json() -> bool:
    return _Voice.format is LogFormat.JSON


def json_line(
    message: str,
    *,
    level: str = "info",
    run: str | None = None,
    stage: str | None = None,
    part: int | None = None,
    **facts: Any,
) -> str:
    """Return one log line; `facts` are further fields."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = {"time": time, "level": level, "run": run or _Voice.run, "stage": stage, "part": part}
    return redact(json.dumps({**fields, "message": message, **facts}, default=str, ensure_ascii=False))


class RunLog:
    """This is the log of a run; it is safe to use from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(
        self, message: str, *, level: str = "info", stage: str | None = None, part: int | None = None, **facts: Any
    ) -> None:
        """Write one line, whole: a reader that follows the file never sees half of one."""
        line = json_line(message, level=level, stage=stage, part=part, **facts) + "\n"
        with suppress(OSError):  # a full disk ends a scan when rows cannot be written, and with its own message
            os.write(self._descriptor, line.encode())


class _RayWarnings(logging.Handler):
    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Progress bars disabled"):
            return  # by us
        self._log(record.getMessage(), level=record.levelname.lower(), stage="ray", logger=record.name)


@contextmanager
def run_log(folder: Path, run: str) -> Iterator[RunLog]:
    """Open the log of a run inside a `with` block; lines are appended to those of earlier calls.

    Args:
        folder: the run's logs folder, made if need be.
        run: the census's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    log = RunLog(descriptor)
    handler = _RayWarnings(log)
    logging.getLogger("ray").addHandler(handler)
    before, _Voice.run = _Voice.run, run
    try:
        yield log
    finally:
        _Voice.run = before
        logging.getLogger("ray").removeHandler(handler)
        os.close(descriptor)
