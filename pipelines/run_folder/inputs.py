"""This module checks what a run needs before any expensive work starts: whether files exist and have the right hashes.

It gives the part of a run's identity that the configuration cannot hold: hashes of models, prompts and references. It
imports neither torch nor Ray, so a wrong path is reported after a second and not after a minute.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from memscan.config import CensusConfig, EmbedderConfig, GeneratorConfig, SegmenterConfig
from memscan.errors import ConfigError, IndexLoadError, IntegrityError, ModelError
from memscan.io import storage
from memscan.io.listing import size_of
from memscan.models.adapters import JSON_PATTERNS, Adapter, adapter_in, adapter_of, check_components
from memscan.models.composition import resolve_checkpoint
from memscan.models.folders import check_checkpoint, check_commit, folder_name, snapshot_in
from memscan.models.identify import not_a_folder
from memscan.models.inversions import inversion_hash
from memscan.models.local_copy import stage
from memscan.models.lora_files import lora_hash
from memscan.models.specification import hash_file, hash_folder
from memscan.prompts.folders import find_prompt_files
from memscan.sources.configured import configured_source

# As `memscan.models.checkpoint.PARTS`, whose module imports diffusers (a test holds them equal).
GENERATOR_PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")


def model_ids(config: CensusConfig) -> dict[str, str]:
    """Return role -> "name@sha256 (12 digits)" of the models.

    Raises:
        ModelError: a folder, a part of it, or a file is missing.
        IntegrityError: a pinned hash does not hold.
        ConfigError: a hash that must be pinned is not.
    """
    sections = {role: _section(config, role) for role in _ROLES}
    return {role: _ROLES[role](section) for role, section in sections.items() if section is not None}


def pinned(config: CensusConfig, known: Mapping[str, str]) -> CensusConfig:
    """Return the configuration for workers, with the hash of every model file with which the run began.

    A worker may start days after the run did, on another machine: it refuses a file that is not this one before
    anything parses it. Folders have no place for a hash in the configuration; `check_folders` is for them.

    Args:
        known: role -> id, as `model_ids` gave when the run began; a role that is not in it is not checked.

    Raises:
        IntegrityError: a file is another one by now.
        ModelError: it is not there any more.
    """
    for role in _ROLES:
        if role in known:
            _check_known(config, role, known)
    sections: dict[str, Any] = {}
    for role in ("segmenter", "embedder"):
        section = getattr(config, role)
        if role in known and section.kind == "onnx" and section.sha256 is None:
            digest = storage.sha256_file(section.path) if storage.is_remote(section.path) else hash_file(section.path)
            sections[role] = section.model_copy(update={"sha256": digest})
    return config.model_copy(update=sections) if sections else config


def check_folders(config: CensusConfig, known: Mapping[str, str], roles: Iterable[str]) -> None:
    """Check that the model folders on this machine are those that the run began with; raises as `pinned`.

    For workers, before they load: what is hashed here is not hashed again by them.
    """
    for role in roles:
        if role in known and getattr(_section(config, role), "kind", "folder") not in ("onnx", "torchscript"):
            _check_known(config, role, known)


def _check_known(config: CensusConfig, role: str, known: Mapping[str, str]) -> None:
    section = _section(config, role)
    _compare(section.path, _ROLES[role](section), known[role])


def check_generator(config: GeneratorConfig, known: str) -> None:
    """Check that the checkpoint on this machine is the one that was scanned; raises as `pinned`."""
    _compare(config.path, generator_id(config), known)


def _compare(path: str, found: str, known: str) -> None:
    if found != known:
        raise IntegrityError(
            f"is {found}, the run began with {known}",
            where=path,
            hint="restore the model and run the same command, or scan into a new folder",
        )


def _section(config: CensusConfig, role: str) -> Any:
    """Return the part of the configuration that says where a model is; None if there is no such model."""
    return config.signals.semantic if role == "semantic" else getattr(config, role)


def generator_id(config: GeneratorConfig) -> str:
    """See `model_ids`. A hub id is named by its pinned revision; nothing is fetched here."""
    added = "".join(f"+lora:{lora_hash(lora)[:12]}" for lora in config.loras)
    added += "".join(f"+inversion:{inversion_hash(one)[:12]}" for one in config.textual_inversions)
    if config.base is None:
        folder = _local_folder(config.path, config.revision)
        if folder is None:
            return f"{config.path}@{config.revision}{added}"
    else:
        folder = resolve_checkpoint(config, JSON_PATTERNS)
    adapter = adapter_in(folder, config)
    if adapter.kind == "stock":
        check_components(folder)
        how = f"+stock:{adapter.pipeline}:{adapter.scheduler}"
        return f"{folder_name(config.path)}@{hash_folder(folder, adapter.parts)[:12]}{how}{added}"
    check_checkpoint(folder)
    switches = f"+{hash_file(config.switches)[:12]}" if config.switches else ""
    # A distilled model keeps its own scheduler, which the configuration's "auto" does not say.
    rule = f"+{adapter.scheduler}" if adapter.scheduler != config.own_scheduler else ""
    return f"{folder_name(config.path)}@{hash_folder(folder, adapter.parts)[:12]}{switches}{rule}{added}"


def adapter_for(config: CensusConfig) -> Adapter:
    """Return the adapter that samples this census, after a check that the rest of the census works with it.

    Raises:
        ModelError: see `adapters.adapter_of`.
        ConfigError: a screen of a stock pipeline, or another setting that only our own sampling loop has.
    """
    adapter = adapter_of(config.generator)
    if adapter.kind == "stock" and config.screen is not None:
        raise ConfigError(
            f"a screen needs the first step of memscan's own sampling loop, and {config.generator.path} is sampled by "
            f"the stock {adapter.pipeline}",
            where="screen",
            hint="leave it out: every prompt is then scanned in full",
        )
    return adapter


def segmenter_id(config: SegmenterConfig) -> str:
    """See `model_ids`."""
    if config.kind == "onnx":
        return _file_id(config.path, config.sha256)
    return _folder_id(config.path, config.revision)


def embedder_id(config: EmbedderConfig, section: str = "embedder") -> str:
    """See `model_ids`."""
    if config.kind == "transformers":
        return _folder_id(config.path, config.revision)
    if config.sha256 is None and config.kind == "torchscript":
        raise ConfigError(
            "TorchScript is executable code and needs its sha256",
            where=f"{section}.sha256",
            hint=f"set the hash that the publisher of {Path(config.path).name} gives for it",
        )
    return _file_id(config.path, config.sha256)


_ROLES: dict[str, Callable[[Any], str]] = {
    "generator": generator_id,
    "segmenter": segmenter_id,
    "embedder": embedder_id,
    "semantic": lambda section: embedder_id(section, "signals.semantic"),
}


def prompt_ids(config: CensusConfig) -> dict[str, str]:
    """Return, by prompt file, its sha256 (12 digits), or size and ETag if the file is remote.

    Raises:
        InputError: a path is missing, or a folder holds no prompt files.
    """
    found: dict[str, str] = {}
    stamps: dict[str, dict[str, str]] = {}
    for file, _ in find_prompt_files(config.prompts.paths).files:
        remote = storage.is_remote(file)
        folder, _, name = file.rpartition("/")
        if remote and folder not in stamps:
            stamps[folder] = storage.stamps(folder)
        # Of a remote file the length and what changes with its content; runs of older versions know the length.
        found[file] = f"{storage.file_size(file)} bytes, {stamps[folder][name]}" if remote else hash_file(file)[:12]
    return found


AT_PATH = "the index at index.path"


def reference_id(config: CensusConfig) -> str:
    """Return the identity of the references.

    It is the names and sizes of the source's files, or says that they are the index at `index.path`.

    An index at a path of its own is the same input before it is built and afterwards, or a scan that built it could not
    be resumed; the run keeps its version and hash from the moment it is there.

    Raises:
        IndexLoadError: there is no index at the path, and no source to build it from.
        InputError: the source is missing or holds no images.
    """
    path = config.index.path
    if path is not None and storage.exists(storage.join(path, "manifest.json")):
        return AT_PATH
    if config.index.source is None:
        raise IndexLoadError("no index here (no manifest.json)", where=str(path), hint="build it: memscan index build")
    source = configured_source(config.index)
    files = files_id("", ((source.layout.name(file), size_of(file)) for file in source.layout.all_files))
    return files if path is None else AT_PATH


def files_id(root: str, files: Iterable[tuple[str, int]]) -> str:
    """Return the identity of files by their names below a folder and their sizes."""
    digest = hashlib.sha256()
    count = 0
    for file, size in files:
        digest.update(f"{file.removeprefix(root)}\0{size}\n".encode("utf-8", "surrogateescape"))
        count += 1
    return f"{count} files {digest.hexdigest()[:12]}"


def _local_folder(path: str, revision: str | None) -> Path | None:
    if storage.is_remote(path):
        return stage(path)
    if os.path.isdir(path):
        return snapshot_in(Path(path))
    if os.path.exists(path):
        raise not_a_folder(Path(path))
    if revision is None or path.startswith((".", "/")) or path.count("/") != 1:
        raise ModelError("no such model folder", where=path, hint="give a folder, or a hub id together with `revision`")
    check_commit(path, revision)
    return None


def _folder_id(path: str, revision: str | None) -> str:
    folder = _local_folder(path, revision)
    return f"{path}@{revision}" if folder is None else f"{folder_name(path)}@{hash_folder(folder)[:12]}"


def _file_id(path: str, expected: str | None) -> str:
    if not storage.exists(path) or storage.is_dir(path):
        raise ModelError("no such model file", where=path)
    found = storage.sha256_file(path) if storage.is_remote(path) else hash_file(path)
    if expected is not None and found != expected.strip().lower():
        raise IntegrityError(
            f"sha256 is {found}, expected {expected}",
            where=path,
            hint="the file is damaged or another one; it was not loaded",
        )
    return f"{folder_name(path)}@{found[:12]}"
