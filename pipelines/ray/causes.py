"""This module finds the error on which a user can act inside the errors that Ray, Arrow or FAISS wrap around it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from memscan.errors import MemscanError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAYS_FULL = tuple(os.strerror(number) for number in _FULL)


def user_error(error: BaseException) -> MemscanError | None:
    """Return the `MemscanError` inside an exception, or one that says that a disk is full; None if there is neither."""
    chain = list(_chain(error))
    # Ray's wrapper is also an instance of what it wraps: the innermost one is the one that was raised.
    found = next((one for one in chain if isinstance(one, MemscanError) and _inner(one) is None), None)
    return found or next((full for one in chain if (full := _full_disk(one)) is not None), None)


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
