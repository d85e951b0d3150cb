"""This module handles this machine's cache of objects from a store: where it is, and how processes share it.

`MEMSCAN_CACHE` names it. Otherwise it is `memscan/` below `XDG_CACHE_HOME`, or below `~/.cache`. If it is removed, the
next start has to copy again. It should be on a fast local disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memscan.errors import MemscanError

CACHE_VARIABLE = "MEMSCAN_CACHE"


def cache_folder() -> Path:
    """Return where copies are kept; it need not exist yet.

    An empty environment variable counts as not set.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "memscan")


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Let one process of this machine run the block while the others wait.

    The lock ends with its process, however that ends.

    Args:
        lock: a file, made with its folders if there is none.

    Raises:
        MemscanError: it cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise MemscanError(
            f"cannot write the cache ({error.strerror or error})",
            where=str(lock.parent),
            hint=f"set {CACHE_VARIABLE} to a folder that can be written",
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_room(needed: int, source: str, hint: str = f"set {CACHE_VARIABLE} to a folder on a larger disk") -> None:
    """Refuse a copy that the cache's disk has no room for.

    Args:
        needed: bytes.
        source: what would be copied.

    Raises:
        MemscanError: it does not fit.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MemscanError(
            f"{needed / 1e9:.3g} GB do not fit into the {free / 1e9:.3g} GB that are free in {folder}",
            where=source,
            hint=hint,
        )
