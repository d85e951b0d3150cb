"""A planted world's folder: what is in it, and how a census of it is configured.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from memscan.config import CensusConfig, load_config
from memscan.errors import ConfigError, IntegrityError, ModelError
from memscan.models.specification import hash_file

MANIFEST = "manifest.json"
CENSUS = "census.yaml"
_PATH_KEYS = (("generator", "path"), ("segmenter", "path"), ("embedder", "path"), ("index", "source"))


@dataclass(frozen=True)
class FileCheck:
    """One file of a manifest: `state` is "ok", "missing", "truncated" or "changed"."""

    name: str
    state: str


def shipped_world() -> Path:
    """The world inside the package."""
    return Path(__file__).parent / "shipped"


def world_folder(world: str | Path | None) -> Path:
    """The folder of a world, the shipped one by default. Raises ModelError where there is none."""
    folder = Path(world) if world is not None else shipped_world()
    if not (folder / MANIFEST).is_file():
        raise ModelError(
            f"no planted world here ({MANIFEST} is missing)",
            where=str(folder),
            hint="build one with: memscan planted build --seed S --out DIR",
        )
    return folder


def world_config(world: str | Path | None = None, out: str | None = None) -> CensusConfig:
    """The census of a world, with its paths made absolute and, if given, `out` as run folder.

    Raises:
        ModelError: the folder is not a world.
        ConfigError: its census.yaml does not validate.
    """
    folder = world_folder(world).resolve()
    config = load_config(folder / CENSUS)
    data = config.model_dump()
    for section, key in _PATH_KEYS:
        data[section][key] = str(folder / data[section][key])
    data["prompts"]["paths"] = [str(folder / path) for path in data["prompts"]["paths"]]
    if out is not None:
        data["out"] = out
    return CensusConfig.model_validate(data)


def check_world(world: str | Path | None = None) -> list[FileCheck]:
    """Compare every file with the manifest. Raises ModelError where the folder is not a world."""
    folder = world_folder(world)
    return [FileCheck(name, _state(folder / name, entry)) for name, entry in _read_json(folder / MANIFEST).items()]


def verify_world(world: str | Path | None = None) -> None:
    """Raises IntegrityError naming the first file that is not what the manifest says."""
    folder = world_folder(world)
    for check in check_world(folder):
        if check.state != "ok":
            raise IntegrityError(
                f"is {check.state}",
                where=str(folder / check.name),
                hint="restore the world folder, or build a new world",
            )


def _state(path: Path, entry: dict[str, Any]) -> str:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return "truncated" if path.stat().st_size < entry["bytes"] else "changed"
    return "ok" if hash_file(path) == entry["sha256"] else "changed"


def write_manifest(folder: Path) -> None:
    """Record every file of the world. Call it last."""
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in _files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")


def world_source(world: str | Path | None = None) -> str:
    """One line that names a world exactly: its seed and the hash of its manifest."""
    folder = world_folder(world)
    return f"planted world {world_facts(folder)['seed']} ({hash_file(folder / MANIFEST)[:12]})"


def check_apart(world: str | Path | None, calibration: str | Path | None) -> None:
    """Check that thresholds are not chosen on the world that they are reported on.

    Raises:
        ModelError: one of the two folders is no world.
        ConfigError: they are the same world.
    """
    if calibration is not None and world_source(world) == world_source(calibration):
        raise ConfigError(
            "is the world that is reported on: thresholds are chosen on another one",
            where=str(calibration),
            hint="build one with: memscan planted build --seed S --out DIR --start-from shipped",
        )


def world_facts(world: str | Path | None = None) -> dict[str, Any]:
    """What world.json says."""
    return dict(_read_json(world_folder(world) / "world.json"))


def read_truth(world: str | Path | None = None) -> pa.Table:
    """The ground truth (`records.TRUTH`)."""
    return pq.read_table(world_folder(world) / "truth.parquet")


def write_census(folder: Path, settings: dict[str, Any]) -> None:
    """Write census.yaml."""
    head = "# A census of this planted world. Paths are relative to this folder.\n"
    (folder / CENSUS).write_text(head + yaml.safe_dump(settings, sort_keys=False))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read ({error})", where=str(path), hint="restore the world folder") from error
    if not isinstance(data, dict):
        raise ModelError("is not a JSON object", where=str(path), hint="restore the world folder")
    return data
