"""This module checks, before Ray starts, what Ray needs from this machine.

Ray itself reports such problems poorly, late, or never.

If the temporary folder is full, Ray's processes fail one after another and are started again. If its path is too long,
Ray's sockets cannot be made. If the home folder cannot be written, Ray's token cannot be kept. Here each of these is
reported in one line at once, or is no problem.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memscan.errors import MemscanError

# Logs of a session that does little are some megabytes; the raylet looks at every tenth of a percent besides.
ROOM_BYTES = 100 * 2**20
SOCKET_BYTES = 107  # of a path of a Unix socket, without its final zero
_PATH = "ray/session_2026-11-30_00-00-00_000000_{pid}/sockets/plasma_store"
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def check_place() -> None:
    """Check the folder of Ray's sessions.

    Raises:
        MemscanError: it is full, cannot be written, or its path is too long for sockets.
    """
    name = next((one for one in ("RAY_TMPDIR", "TMPDIR") if one in os.environ), None)
    folder = Path(os.environ[name] if name else "/tmp")
    where = f"{name}={folder}" if name else str(folder)
    hint = "set RAY_TMPDIR to a folder with room on this machine's disk"
    path = str(folder.absolute() / _PATH.format(pid=os.getpid()))
    if (length := len(os.fsencode(path))) > SOCKET_BYTES:
        raise MemscanError(
            f"is too long for Ray's sockets, whose paths have {SOCKET_BYTES} bytes at most and would have {length}",
            where=where,
            hint="set RAY_TMPDIR to a folder with a short path",
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        probe = folder / "ray" / f".{secrets.token_hex(8)}"
        with probe.open("xb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
        disk = os.statvfs(folder)
    except OSError as error:
        raise MemscanError(f"Ray cannot write there ({error.strerror or error})", where=where, hint=hint) from error
    if (free := disk.f_bavail * disk.f_frsize) < ROOM_BYTES:
        raise MemscanError(
            f"has {free // 2**20} MiB free, and Ray needs {ROOM_BYTES // 2**20} for its session",
            where=where,
            hint=hint,
        )


@contextmanager
def token() -> Iterator[None]:
    """Return a token for Ray's processes if the home folder, in which Ray would keep one, cannot be written."""
    if {_MODE, _TOKEN, _TOKEN_PATH} & os.environ.keys() or _home_keeps_one():
        yield
        return
    os.environ[_TOKEN] = secrets.token_hex(32)
    try:
        yield
    finally:
        os.environ.pop(_TOKEN, None)


def _home_keeps_one() -> bool:
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return True
        folder.mkdir(exist_ok=True)
        probe = folder / f".{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return False
    return True
