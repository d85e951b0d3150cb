"""This module finds the error on which a user can act inside the errors that Ray, Arrow or FAISS wrap around it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from memscan.errors import MemscanError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAYS_FULL = tuple(os.strerror(number) for number in _FULL)

_GONE = ("LocalRayletDiedError", "RpcError", "RaySystemError")
_SAYS_GONE = ("Broken pipe", "Connection", "connection", "GCS", "raylet", "Raylet")


def user_error(error: BaseException) -> MemscanError | None:
    """Return the `MemscanError` inside an exception, or one that says that a disk is full or that Ray is gone.

    It is None if there is neither.
    """
    chain = list(_chain(error))
    # Ray's wrapper is also an instance of what it wraps: the innermost one is the one that was raised.
    found = next((one for one in chain if isinstance(one, MemscanError) and _inner(one) is None), None)
    return found or next((told for one in chain if (told := _full_disk(one) or _ray_gone(one)) is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = _inner(current) or current.__cause__


def _inner(error: BaseException) -> BaseException | None:
    """Return what Ray's exceptions hold."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else None


def _full_disk(error: BaseException) -> MemscanError | None:
    """Libraries that write for themselves (Arrow, FAISS, NumPy) raise OSErrors, or others that only say so."""
    text = str(error)
    says = next((words for words in _SAYS_FULL if words in text), None)
    if says is None and not (isinstance(error, OSError) and error.errno in _FULL):
        return None
    where = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else None
    what = says or os.strerror(getattr(error, "errno", 0) or errno.ENOSPC)
    return MemscanError(what, where=where, hint="make room and give the same command again")


def _ray_gone(error: BaseException) -> MemscanError | None:
    """Most often Ray ends its driver without a word (`supervisor.py`); now and then it raises what it noticed."""
    kind = type(error)
    if not kind.__module__.startswith("ray.") or kind.__name__ not in _GONE:
        return None
    said = " ".join(str(error).split())
    if kind.__name__ == "RaySystemError" and not any(word in said for word in _SAYS_GONE):
        return None
    what = f"Ray's processes died or cannot be reached any more ({said[:160] or kind.__name__})"
    return MemscanError(what, hint="run the same command to resume")
