"""This module expands paths with `{00000..00127}`, `{a,b}`, `*`, `?`, `[0-9]` and `**`, on a disk or in a store.

If a file has exactly the given name, the path is used as it is, whatever characters it holds. Braces are expanded to
names, so a file that is missing from a range is named. A `*` finds whatever exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from memscan.errors import InputError
from memscan.io import storage

MAX_NAMES = 1_000_000  # of one range in braces
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")


def expand(path: str) -> list[str]:
    """Return the files and folders that a path means, each of them there, in the order of the pattern.

    Raises:
        InputError: a name that is spelled out is missing, or a pattern finds nothing.
    """
    if storage.exists(path):
        return [path]
    if not (_BRACES.search(path) or _WILD.search(path)):
        raise InputError("no such file or folder", where=path)
    found: dict[str, None] = {}
    for name in _spelled(path):
        if storage.exists(name):
            found[name] = None
        elif _WILD.search(name):
            found.update(dict.fromkeys(storage.find_matching(name)))
        else:
            raise InputError("no such file or folder", where=name, hint=f"{path} names it")
    if not found:
        raise InputError("no file or folder has such a name", where=path, hint="the path is read as a pattern")
    return list(found)


def expand_all(paths: Sequence[str]) -> list[str]:
    """Return `expand` of each path."""
    return [found for path in paths for found in expand(path)]


def common_folder(paths: Sequence[str]) -> str:
    """Return the innermost folder that all paths lie in, with a slash at its end; "" for the working directory."""
    split = [storage.join(path).split("/")[:-1] for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared) + "/" if shared else ""


def _spelled(path: str) -> Iterator[str]:
    """Yield every name that braces stand for."""
    match = _BRACES.search(path)
    if match is None:
        yield path
        return
    head, tail = path[: match.start()], path[match.end() :]
    for choice in _choices(match[1], path):
        for rest in _spelled(tail):
            yield f"{head}{choice}{rest}"


def _choices(inside: str, path: str) -> Iterator[str]:
    limits = _RANGE.fullmatch(inside)
    if limits is None:
        yield from inside.split(",")
        return
    first, last = int(limits[1]), int(limits[2])
    if abs(last - first) >= MAX_NAMES:
        raise InputError(f"a range of {abs(last - first) + 1} names", where=path, hint="name their folder instead")
    width = max(len(limits[1]), len(limits[2])) if limits[1].startswith("0") or limits[2].startswith("0") else 0
    step = 1 if last >= first else -1
    yield from (f"{number:0{width}d}" for number in range(first, last + step, step))
