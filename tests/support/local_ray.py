"""Ray Data and Ray's actors in this process: a job goes all of its own way, and no process is started for it.

What a job asks of Ray is done here by calls: an actor is an object, a block is a table that a stage is called with, one
after another in their order. What would be sent to a worker goes through Ray's pickle all the same. Only Ray itself can
show several workers, lost ones, and errors that cross processes: these have tests of their own, on a real one
(`ray_once`). The other half of this is `alone.py`: Ray Train's loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest


@contextmanager
def local_ray() -> Iterator[None]:
    """Jobs that run in the `with` block find a Ray that is this process: one core, no GPU."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield
    torch.set_num_threads(threads)  # a stage sets its own


def install(patch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.data

    from pipelines.ray.session import Machine

    patch.setattr(ray, "is_initialized", lambda: True)
    patch.setattr("pipelines.ray.session._machine", lambda _ray: Machine(2.0, 0.0, 1, local=True))
    patch.setattr("pipelines.ray.metrics._instrument", lambda _metric: None)
    functions = {"remote": _remote, "get": _get, "put": _Reference, "wait": _wait, "kill": lambda _actor: None}
    for name, function in functions.items():
        patch.setattr(ray, name, function)
    for name in ("from_blocks", "from_arrow"):
        patch.setattr(ray.data, name, _Dataset.of)


class _Dataset:
    """What the jobs use of a Ray Data set: lazy, in the order of its blocks."""

    def __init__(self, tables: Callable[[], Iterator[pa.Table]]) -> None:
        self._tables = tables

    @classmethod
    def of(cls, tables: Sequence[pa.Table]) -> _Dataset:
        return cls(lambda: iter(tables))

    def map_batches(
        self,
        function: Any,
        *,
        fn_args: Sequence[Any] = (),
        fn_constructor_args: Sequence[Any] = (),
        batch_size: int | None,
        batch_format: str,
        **_resources: Any,
    ) -> _Dataset:
        assert batch_format == "pyarrow"

        def tables() -> Iterator[pa.Table]:
            made = _sent(function)
            call = made(*_sent(tuple(fn_constructor_args))) if isinstance(function, type) else made
            for table in self._tables():
                for at in range(0, table.num_rows, batch_size or max(1, table.num_rows)):
                    yield call(table.slice(at, batch_size), *_sent(tuple(fn_args)))

        return _Dataset(tables)

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Iterator[pa.Table]:
        yield from self._tables()


class _Reference:
    """A value, or the error instead of one, that `ray.get` gives."""

    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error = value, error


class _Actor:
    """A handle: methods are called at once. A handle that was sent is one of the same actor."""

    _numbers = itertools.count()
    _made: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, number: int) -> None:
        self._number = number

    @classmethod
    def start(cls, kind: type, *args: Any) -> _Actor:
        handle = cls(next(cls._numbers))
        cls._made[handle._number] = kind(*_sent(_values(args)))
        return handle

    def __reduce__(self) -> Any:
        return _Actor, (self._number,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(self._made[self._number], name)

        return SimpleNamespace(remote=lambda *args, **kwargs: _called(method, args, kwargs))


def _remote(*kinds: Any, **_resources: Any) -> Any:
    """`ray.remote(kind)` and `ray.remote(num_cpus=…)(kind)`, of a class or a function."""

    def made(kind: Any) -> Any:
        if isinstance(kind, type):
            return SimpleNamespace(remote=lambda *args: _Actor.start(kind, *args))
        return SimpleNamespace(remote=lambda *args, **kwargs: _called(kind, args, kwargs))

    return made(*kinds) if kinds else made


def _called(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Reference:
    try:
        return _Reference(function(*_sent(_values(args)), **_sent(dict(kwargs))))
    except Exception as error:  # raised where the result is asked for
        return _Reference(error=error)


def _wait(calls: Sequence[Any], timeout: float | None = None) -> tuple[list[Any], list[Any]]:
    return list(calls), []  # a call is over when it has been made


def _get(wanted: Any, timeout: float | None = None) -> Any:
    if isinstance(wanted, list):
        return [_get(one) for one in wanted]
    if wanted.error is not None:
        raise wanted.error
    return wanted.value


def _values(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_get(one) if isinstance(one, _Reference) else one for one in args)


def _sent(value: Any) -> Any:
    """As a worker would get it."""
    from ray import cloudpickle

    return cloudpickle.loads(cloudpickle.dumps(value))
