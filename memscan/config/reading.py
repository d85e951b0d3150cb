"""This module reads YAML and overrides into a checked configuration. One line names every wrong key and its place."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from memscan.config.census import CensusConfig
from memscan.config.measurement import MetricConfig
from memscan.errors import ConfigError, InputError
from memscan.io import storage
from memscan.validation import Location, explain, listed

Model = TypeVar("Model", bound=BaseModel)
# Keys, in whatever section, whose values are paths (a test holds them to the configuration).
PATH_KEYS = {"base", "census", "image_root", "out", "path", "paths", "source", "switches"}
# Of a longer text no lines are noted: no configuration is so long, and aliases can make a short one explode.
_LARGE = 2**20


class _Written(dict[str, Any]):
    """This is the mapping of a YAML file, which knows the line of each of its keys."""

    lines: dict[tuple[int | str, ...], int]


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """This YAML loader refuses two keys of one name; the safe loader silently takes the last of them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} is given twice, again in line {line}"
                )
            if name is not None:
                seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def parse_metric(data: dict[str, Any], *, where: str = "metric") -> MetricConfig:
    """Validate the `metric` section alone. Raises ConfigError as `load_config` does."""
    return parse_section(MetricConfig, data, where=where)


def parse_section(model: type[Model], data: Any, *, where: str) -> Model:
    """Validate a mapping by a pydantic model. Raises ConfigError as `load_config` does."""
    if not isinstance(data, dict):
        raise ConfigError("must be a mapping of keys to values", where=where)
    try:
        return model.model_validate(_from_home(data, where))
    except ValidationError as error:
        raise ConfigError(explain(error, model, _places(data)), where=where) from error


def _places(data: Any, given: Sequence[str] = ()) -> Callable[[Location], str]:
    """Return where the value of a key stands: in an override, or in a line of the file that `data` was read from."""
    lines = data.lines if isinstance(data, _Written) else {}

    def place(location: Location) -> str:
        key = ".".join(map(str, location))
        if override := next((one for one in given if f"{key}.".startswith(f"{one}.")), None):
            return f"--set {override}"
        path = tuple(location)
        while path and path not in lines:  # a key that is missing stands where its section does
            path = path[:-1]
        return f"line {lines[path]}" if path else ""

    return place


def _lines(root: Any) -> dict[tuple[int | str, ...], int]:
    """Line, from 1 on, of every key and item below a YAML node; of what aliases repeat, where it is written first."""
    found: dict[tuple[int | str, ...], int] = {}
    seen: set[int] = set()  # aliases of aliases would be walked exponentially often
    waiting: list[tuple[tuple[int | str, ...], Any]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            inside = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        elif isinstance(node, yaml.SequenceNode):
            inside = [(number, value, value) for number, value in enumerate(node.value)]
        else:
            continue
        for name, marked, value in inside:
            found[(*path, name)] = marked.start_mark.line + 1
            waiting.append(((*path, name), value))
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file, local or s3://, holds. Raises ConfigError as `load_config` does."""
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except InputError as error:
        raise ConfigError(f"cannot read the configuration ({error.what})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the configuration ({error})", where=str(path)) from error
    try:
        data = yaml.load(text, _Strict)
        lines = _lines(yaml.compose(text, _Strict)) if len(text) < _LARGE else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99 looks like a date
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("must be a mapping of keys to values", where=str(path), hint="see examples/")
    found = _Written(data)
    found.lines = lines
    return found


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CensusConfig:
    """Read a YAML configuration and apply `key.sub=value` overrides (values in YAML syntax).

    Relative paths inside the file are left as written: they are relative to the working directory.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate; names the key and the nearest valid one.
    """
    return parse_config(read_yaml(path), overrides, where=str(path))


def parse_config(data: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "configuration") -> CensusConfig:
    """Validate a configuration given as a mapping. Raises ConfigError as `load_config` does."""
    merged: dict[str, Any] = copy.deepcopy(data)
    given: list[str] = []
    wrong: list[ConfigError] = []
    for override in overrides:
        key = override.partition("=")[0]
        try:
            if key in given:
                raise ConfigError(f"{key!r} is given twice", where="--set", hint="give it once")
            given.append(key)
            apply_override(merged, override)
        except ConfigError as error:
            wrong.append(error)
    if len(wrong) > 1:
        told = [f"{one.what}; {one.hint}" if one.hint else one.what for one in wrong]
        raise ConfigError(listed(told), where="--set")
    if wrong:
        raise wrong[0]
    try:
        return CensusConfig.model_validate(_from_home(merged, where))
    except ValidationError as error:
        raise ConfigError(explain(error, CensusConfig, _places(data, given)), where=where) from error


def _from_home(data: Any, where: str, key: str = "", known: dict[tuple[int, str], Any] | None = None) -> Any:
    """Return the configuration with `~/` and `~user/` at the beginning of paths made what a shell makes of them."""
    known = {} if known is None else known  # aliases of aliases would be walked exponentially often
    if isinstance(data, (dict, list)):
        if (id(data), key) not in known:
            known[id(data), key] = (
                {name: _from_home(value, where, str(name), known) for name, value in data.items()}
                if isinstance(data, dict)
                else [_from_home(value, where, key, known) for value in data]
            )
        return known[id(data), key]
    if key not in PATH_KEYS or not isinstance(data, str) or not data.startswith("~"):
        return data
    found = os.path.expanduser(data)
    if found.startswith("~"):
        raise ConfigError(
            f"{key}: {data!r} is in a home folder that is not known",
            where=where,
            hint="write ./~ if the name begins with ~",
        )
    return found


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set a key of nested mappings as `key.sub=value` says. Raises ConfigError if the text has another form."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(
            f"override {override!r} is not key=value", where="--set", hint="for example --set generator.steps=20"
        )
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:  # also if the section exists and its value is null
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{key!r}: {parent!r} is a value, not a section", where="--set")
        node = child
    try:
        # YAML would drop " #3" of out=runs/exp #3 as a comment, but here it is the rest of a path.
        node[leaf] = value if " #" in value and value[:1] not in "'\"[{" else yaml.load(value, _Strict)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99 looks like a date
        raise ConfigError(f"{key!r}: {value!r} is not a YAML value", where="--set") from error
