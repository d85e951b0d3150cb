"""This module knows where the files of a run are.

Paths are absolute while it works, and the manifest has `run://` names for files inside the run folder.

A configuration may name its files relative to the directory that a command is given in. Workers have directories of
their own (Ray Train changes its workers'), and the next command may be given elsewhere, so paths are made absolute
here, once, when a run begins, and kept so in run.json. What lies in the run folder itself is kept as `run://NAME`, so
that the folder can be moved. Runs of older versions have relative paths, which are taken from the current directory.

The configuration as it was written stays the run's identity, and its fingerprint; `Places` makes two spellings of one
file equal when a run is resumed.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscan.config import CensusConfig
from memscan.errors import MemscanError

INSIDE = "run://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Sections and keys of a census configuration that hold a path; a model's may also be a hub id.
_MODELS = ("generator", "segmenter", "embedder", "signals.semantic", "clusters")
_FILES = ("generator.switches", "index.path", "index.source", "index.image_root", "prompts.paths")
_INPUT = "inputs."
_REFERENCES = "inputs.references"


@dataclass(frozen=True)
class Places:
    """A command's paths are relative to these places.

    Args:
        directory: where the command was given, absolute.
        folder: the run folder, absolute or s3://.
    """

    directory: str
    folder: str

    @classmethod
    def of(cls, folder: str) -> Places:
        """Return the places of this process and a run folder."""
        here = os.getcwd()
        return cls(here, absolute(folder, here))

    def open(self, path: str) -> str:
        """Return a path of a manifest or a configuration, in a form that every process understands."""
        if path.startswith(INSIDE):
            inner = path.removeprefix(INSIDE)
            # Not `storage.join`: "run://" alone is the folder itself.
            return f"{self.folder.rstrip('/')}/{inner}" if inner else self.folder
        return absolute(path, self.directory)

    def keep(self, path: str) -> str:
        """Return a path as a manifest holds it: `run://` where it lies in the run folder, otherwise absolute."""
        found = self.open(path)
        root = self.folder.rstrip("/")
        if found.rstrip("/") == root:
            return INSIDE
        return INSIDE + found.removeprefix(f"{root}/") if found.startswith(f"{root}/") else found

    def opened(self, config: CensusConfig) -> CensusConfig:
        """Return the configuration with absolute paths; its `out` is the run folder."""
        data = _mapped(config.model_dump(mode="json"), self.open, self.directory)
        return CensusConfig.model_validate({**data, "out": self.folder})

    def kept(self, config: CensusConfig) -> dict[str, Any]:
        """Return the configuration as a manifest holds it."""
        return {**_mapped(config.model_dump(mode="json"), self.keep, self.directory), "out": INSIDE}

    def spelled(self, identity: Mapping[str, str]) -> dict[str, str]:
        """Return a run's identity with its paths as `keep` writes them, to compare it with that of another run."""
        found = {}
        for key, value in identity.items():
            name = key
            if key.startswith(_INPUT) and key != _REFERENCES:
                name = _INPUT + self.keep(key.removeprefix(_INPUT))
            found[name] = self._value(key, value)
        return found

    def _value(self, key: str, value: str) -> str:
        if key in _FILES:
            return json.dumps(_each(json.loads(value), self.keep))
        if key in ("generator.loras", "generator.textual_inversions"):
            return json.dumps(_loras(json.loads(value), self.keep), sort_keys=True)
        section, _, leaf = key.rpartition(".")
        if (leaf == "path" and section in _MODELS) or key == "generator.base":
            return json.dumps(_model(json.loads(value), self.keep, self.directory))
        return value


def shown_config(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration as people are shown it: paths below the directory where it began as they were written.

    A report is handed around, and folders of somebody's machine say nothing in it.
    """
    config = copy.deepcopy(dict(manifest["config"]))
    directory = (manifest.get("begun_in") or {}).get("directory")
    if not directory:
        return config
    root = f"{directory.rstrip('/')}/"
    return _mapped(config, lambda path: path.removeprefix(root), directory)


def absolute(path: str, directory: str | None = None) -> str:
    """Return an absolute path; a path with a scheme (s3://) is not changed."""
    if _SCHEME.match(path):
        return path
    return os.path.normpath(os.path.join(directory or os.getcwd(), path))


def local_folder(path: str) -> Path:
    """Return an absolute folder on this machine for a result. Raises MemscanError for one on s3://."""
    if _SCHEME.match(path):  # before `Path` makes s3:/ of it
        raise MemscanError("the result must be a local folder", where=path, hint="give --out DIR")
    return Path(absolute(path))


def _mapped(data: dict[str, Any], change: Callable[[str], str], directory: str | None = None) -> dict[str, Any]:
    for section, key in (name.rpartition(".")[::2] for name in _FILES):
        node = _node(data, section)
        if node is not None:
            node[key] = _each(node.get(key), change)
    for section in _MODELS:
        node = _node(data, section)
        if node is not None:
            node["path"] = _model(node.get("path"), change, directory)
    generator = _node(data, "generator")
    if generator is not None:
        generator["base"] = _model(generator.get("base"), change, directory)
        for key in ("loras", "textual_inversions"):
            generator[key] = _loras(generator.get(key, []), change)
    return data


def _loras(value: Any, change: Callable[[str], str]) -> Any:
    return [{**one, "path": change(one["path"])} for one in value] if isinstance(value, list) else value


def _node(data: dict[str, Any], section: str) -> dict[str, Any] | None:
    node: Any = data
    for name in section.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [change(one) for one in value]
    return change(value) if isinstance(value, str) else value


def _model(value: Any, change: Callable[[str], str], directory: str | None = None) -> Any:
    """Return a model's path; a hub id, which is not there as a folder, as it is."""
    if not isinstance(value, str):
        return value
    if _HUB_ID.fullmatch(value) and not os.path.exists(absolute(value, directory)):
        return value
    return change(value)


def relative_paths(value: Any) -> Iterator[str]:
    """Yield paths in a configuration that another process could misunderstand.

    There are none in one of `Places.opened`.
    """
    data = value.model_dump(mode="json")
    found: list[str] = []

    def look(path: str) -> str:
        if not _SCHEME.match(path) and not os.path.isabs(path):
            found.append(path)
        return path

    _mapped(data, look)
    yield from found
