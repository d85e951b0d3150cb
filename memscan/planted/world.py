"""This module describes a planted world's folder, local or s3://: its files, and the configuration of its census.

world.json          seed, size, how long it was trained, what its parts achieved
manifest.json       sha256 and bytes of every other file
checkpoint/         a diffusers StableDiffusionPipeline folder
snapshot/unet/      the same UNet, earlier in its training
segmenter.onnx      birefnet-general's file format
embedder.pt         TorchScript, as SSCD ships
references.parquet  the training images
truth.parquet       what is planted where (`records.TRUTH`)
prompts.csv         the captions to scan
census.yaml         the census, paths relative to this folder
calibration.json    the thresholds in it, and the other world they were calibrated on
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import TypeAdapter, ValidationError

from memscan.config import CensusConfig, load_config
from memscan.errors import ConfigError, InputError, IntegrityError, ModelError
from memscan.index.manifest import FileEntry
from memscan.io import storage
from memscan.models.folders import first_line
from memscan.models.specification import hash_file
from memscan.records import TRUTH

MANIFEST = "manifest.json"
CENSUS = "census.yaml"
_RESTORE = "restore the world folder"
# Of a world: a folder, local or s3://; None for the shipped one.
World: TypeAlias = str | os.PathLike[str] | None
_PATH_KEYS = (("generator", "path"), ("segmenter", "path"), ("embedder", "path"), ("index", "source"))


@dataclass(frozen=True)
class FileCheck:
    """This is one file of a manifest: `state` is "ok", "missing", "truncated" or "changed"."""

    name: str
    state: str


def shipped_world() -> Path:
    """Return the world inside the package."""
    return Path(__file__).parent / "shipped"


def world_folder(world: World = None) -> Path:
    """Return the folder of a world on this machine, the shipped one by default.

    Raises:
        ModelError: there is none, or it is on S3.
    """
    place = _place(world)
    if storage.is_remote(place):
        raise ModelError("is on S3, and this needs a world on this machine", where=place, hint="copy it here first")
    return Path(place)


def planted_world_of(checkpoint: str) -> str | None:
    """Return a name for the planted world that contains a checkpoint's folder; None if no world contains it."""
    folder = checkpoint.rstrip("/").rpartition("/")[0]
    file = storage.join(folder, "world.json") if folder else ""
    if not file or not storage.exists(file) or not storage.exists(storage.join(folder, MANIFEST)):
        return None
    facts = storage.read_json(file)
    return f"planted world {facts['seed']}" if isinstance(facts, dict) and "seed" in facts else None


def _place(world: World) -> str:
    """As `world_folder`, also on s3://."""
    place = os.fspath(world) if world is not None else str(shipped_world())
    if not storage.exists(storage.join(place, MANIFEST)):
        raise ModelError(
            f"no planted world here ({MANIFEST} is missing)",
            where=place,
            hint="build one with: memscan planted build --seed S --out DIR",
        )
    return place


def world_config(world: World = None, out: str | None = None) -> CensusConfig:
    """Return the census of a world, with its paths made absolute and, if given, `out` as run folder.

    Raises:
        ModelError: the folder is not a world.
        ConfigError: its census.yaml does not validate, or names a file outside the folder.
    """
    place = _place(world)
    folder = place if storage.is_remote(place) else str(Path(place).resolve())
    config = load_config(storage.join(folder, CENSUS))
    data = config.model_dump()
    for section, key in _PATH_KEYS:
        data[section][key] = _inside(folder, data[section][key])
    data["prompts"]["paths"] = [_inside(folder, path) for path in data["prompts"]["paths"]]
    if out is not None:
        data["out"] = out
    return CensusConfig.model_validate(data)


def _inside(folder: str, name: str | None) -> str:
    if name is not None and os.path.isabs(name) and not storage.is_remote(folder):
        return name  # written by a person: worlds as we build them have relative paths
    if name is None or not storage.is_inner(name):
        raise ConfigError(f"{name!r} is not a path in the world's folder", where=storage.join(folder, CENSUS))
    return storage.join(folder, name)


def check_world(world: World = None) -> list[FileCheck]:
    """Compare every file with the manifest. Raises ModelError if the folder is not a world."""
    place = _place(world)
    return [FileCheck(name, _state(storage.join(place, name), entry)) for name, entry in _entries(place).items()]


def verify_world(world: World = None) -> None:
    """Check every file against the manifest. Raises IntegrityError that names the first file that differs."""
    for check in check_world(world):
        if check.state != "ok":
            raise IntegrityError(
                f"is {check.state}",
                where=storage.join(_place(world), check.name),
                hint="restore the world folder, or build a new world",
            )


def _entries(place: str) -> dict[str, FileEntry]:
    path = storage.join(place, MANIFEST)
    try:
        entries = TypeAdapter(dict[str, FileEntry]).validate_python(_read_json(path))
    except ValidationError as error:
        raise ModelError(
            f"is not the manifest of a world ({error.errors()[0]['msg']})", where=path, hint=_RESTORE
        ) from None
    if outside := next((name for name in entries if not storage.is_inner(name)), None):
        raise ModelError(f"names a file outside the folder ({outside!r})", where=path, hint=_RESTORE)
    return entries


def _state(path: str, entry: FileEntry) -> str:
    if not storage.exists(path) or storage.is_dir(path):
        return "missing"
    size = storage.file_size(path)
    if size != entry.bytes:
        return "truncated" if size < entry.bytes else "changed"
    return "ok" if _hash(path) == entry.sha256 else "changed"


def _hash(path: str) -> str:
    return storage.sha256_file(path) if storage.is_remote(path) else hash_file(path)


def write_manifest(folder: Path) -> None:
    """Record every file of the world. Call it last."""
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in _files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")


def world_source(world: World = None) -> str:
    """Return one line that names a world exactly: its seed and the hash of its manifest."""
    return f"planted world {world_facts(world).get('seed')} ({_hash(storage.join(_place(world), MANIFEST))[:12]})"


def check_apart(world: World, calibration: World) -> None:
    """Check that thresholds are not chosen on the world that they are reported on.

    Raises:
        ModelError: one of the two folders is not a world.
        ConfigError: they are the same world.
    """
    if calibration is not None and world_source(world) == world_source(calibration):
        raise ConfigError(
            "is the world on which results are reported: choose thresholds on another one",
            where=str(calibration),
            hint="build one with: memscan planted build --seed S --out DIR --start-from shipped",
        )


def world_facts(world: World = None) -> dict[str, Any]:
    """Return the content of world.json."""
    return _read_json(storage.join(_place(world), "world.json"))


def read_truth(world: World = None) -> pa.Table:
    """Return the ground truth (`records.TRUTH`). Raises ModelError if it is damaged or is not such a table."""
    path = storage.join(_place(world), "truth.parquet")
    filesystem, inner = storage.arrow_filesystem(path)
    try:
        table = pq.read_table(inner, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise ModelError(f"cannot be read ({first_line(error)})", where=path, hint=_RESTORE) from error
    if not table.schema.equals(TRUTH):
        raise ModelError("is not the table of a world's truth", where=path, hint=_RESTORE)
    return table


def write_census(folder: Path, settings: dict[str, Any]) -> None:
    """Write census.yaml."""
    head = "# A census of this planted world. Paths are relative to this folder.\n"
    (folder / CENSUS).write_text(head + yaml.safe_dump(settings, sort_keys=False))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path


def _read_json(path: str) -> dict[str, Any]:
    try:
        data = storage.read_json(path)
    except InputError as error:
        raise ModelError(f"cannot be read ({error.what})", where=path, hint=_RESTORE) from error
    if not isinstance(data, dict):
        raise ModelError("is not a JSON object", where=path, hint=_RESTORE)
    return data
