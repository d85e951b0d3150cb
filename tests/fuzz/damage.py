"""Documents and files that are almost right: values replaced, keys taken out or added, bytes changed or cut off."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from memscan.errors import MemscanError

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "a/../../b", "s3://x/y", "\0", "", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def one_line(work: Any) -> Any:
    """What the work gives, or None where it refuses in one line; anything else is raised."""
    try:
        return work()
    except MemscanError as error:
        assert str(error)
        assert "\n" not in str(error)
        return None


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """A JSON document in which one to three values, at any depth, are replaced, removed or joined by another."""
    document = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, document)
    return document


def _change(draw: st.DrawFn, node: Any) -> None:
    while node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            continue
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del node[key]
        elif action == "replace":
            node[key] = draw(ANY)
        elif isinstance(node, dict):
            node[draw(ANY.filter(lambda one: isinstance(one, str)))] = node[key]
        else:
            node.append(draw(ANY))
        return


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that are cut off, changed in some places, or both."""
    out = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for _ in range(draw(st.integers(0, 4))):
        if out:
            out[draw(st.integers(0, len(out) - 1))] = draw(st.integers(0, 255))
    return bytes(out)


def files_of(good: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file that should hold `good`: a damaged document, or a spoilt file."""
    whole = json.dumps(good).encode()
    nested = st.just(b"[" * 100_000)
    return (
        damaged(good).map(lambda one: json.dumps(one).encode())
        | spoilt(whole)
        | nested
        | ANY.map(lambda one: json.dumps(one).encode())
    )
