"""This module switches the state of a run.

Every change is a compare-and-swap to the next number of a register.

The file with the highest number, such as `state/000007.json`, is the current state of the run. `run.json` is a copy of
it that is written after the switch, for people and scripts; if both have the same number, `run.json` counts. A change
is made again on top of one that came first, unless that one was made under a later epoch. In that case this driver has
lost the run, and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from memscan.errors import InputError, RunError
from memscan.io import storage
from memscan.io.register import Register
from pipelines.run_folder.folder import RunFolder
from pipelines.run_folder.identity import CODE
from pipelines.run_folder.lease import Lease, taken_over
from pipelines.run_folder.manifest import damage

FORMAT = 1
RESUME = "run the same command to resume"
REVISION = "revision"
ATTEMPTS = 20  # of a change that others come before; two drivers and a person make no three
KEPT = 8  # earlier states, to look at


def now() -> str:
    """Return the time, as manifests have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_state(folder: RunFolder) -> tuple[dict[str, Any], int]:
    """Return a run's manifest and the number of its state; 0 for runs of older versions.

    Raises:
        RunError: there is no run, or its manifest is damaged or of another format.
    """
    if not storage.exists(folder.manifest):
        raise RunError(
            "not a run folder (no run.json)", where=folder.path, hint="give the folder that memscan scan wrote"
        )
    manifest = _read(folder.manifest)
    register = Register(folder.states)
    latest, copied = register.latest(), int(manifest.get(REVISION, 0))
    if latest > copied:
        return _read(register.file(latest)), latest
    return manifest, copied


def _read(path: str) -> dict[str, Any]:
    name = path.rsplit("/", 1)[-1]
    try:
        manifest = storage.read_json(path)
    except InputError as error:
        raise RunError(f"{name} {error.what}", where=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{name} is not of format {FORMAT}", where=path, hint="use the version that wrote it")
    if damaged := damage(manifest):
        raise RunError(f"{name} is damaged ({damaged})", where=path, hint="restore it, or scan into a new folder")
    return manifest


def swap_state(
    folder: RunFolder, manifest: Mapping[str, Any], seen: int, changes: Mapping[str, Any], lease: Lease | None
) -> tuple[dict[str, Any], int]:
    """Make the manifest with the changes the run's state; what is the state then, and its number.

    Args:
        manifest: as this process knows it; the changes are made to it, or to what another process made of it.
        seen: its number.
        lease: of the driver.

    Raises:
        RunError: a later driver has opened the run.
    """
    register = Register(folder.states)
    storage.make_dirs(folder.path)
    for _ in range(ATTEMPTS):
        epoch = int(manifest.get("epoch", 0))
        if lease is not None and epoch > lease.epoch:
            raise taken_over(folder.path)
        known = {**manifest, "epoch": lease.epoch} if lease is not None else dict(manifest)
        following = {**known, **changes, "updated": now(), REVISION: seen + 1}
        text = json.dumps(following, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if seen and register.latest() < seen:  # the folder was copied without its register
            storage.create_new(register.file(seen), json.dumps(dict(manifest)).encode())
        if register.swap(seen, text):
            storage.write_atomic(folder.manifest, text)
            register.keep(KEPT)
            return following, seen + 1
        latest = register.latest()
        if latest <= seen:
            continue
        if not storage.exists(folder.manifest):  # killed between its first state and run.json, or just about to write
            storage.create_new(folder.manifest, storage.read_bytes(register.file(latest)))
        seen, before = latest, manifest
        manifest = _read(register.file(latest))
        if manifest["identity"] != before["identity"] and (manifest["prompts"] or before["prompts"]):
            refuse_other(folder.path, manifest["identity"], before["identity"])
    raise RunError("is changed by other commands again and again", where=folder.path, hint=RESUME)


def refuse_other(path: str, old: Mapping[str, str], content: Mapping[str, str]) -> None:
    """Raise RunError, with what differs, where a folder's run is not the one that is asked for."""
    differing = [key for key in sorted({*old, *content}) if not _same(key, old.get(key), content.get(key))]
    if differing:
        shown = ", ".join(f"{key}: {_short(old.get(key))} -> {_short(content.get(key))}" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise RunError(
            f"holds a run with another configuration ({shown}{more})",
            where=path,
            hint="choose another folder with --set out=DIR, or restore the configuration to resume",
        )


def _same(key: str, old: str | None, new: str | None) -> bool:
    if old == new or key == CODE:  # `refuse_other_code` looks at it, of runs that are not complete
        return True
    # Runs of older versions know remote prompt files by their length only.
    of_file = key.startswith("inputs.") and old is not None and new is not None and old.endswith(" bytes")
    return of_file and str(new).partition(", ")[0] == old


def refuse_foreign(path: str) -> None:
    """Raise RunError if a folder holds files that are not a run's."""
    if storage.exists(path) and not storage.is_dir(path):
        raise RunError("is a file, not a folder", where=path, hint="choose another folder with --set out=DIR")
    # Our own logs, lease and state may be there first: a run that failed before its manifest was written.
    ours = tuple(storage.join(path, name) + "/" for name in ("logs", "lease", "state", "scratch"))
    if storage.is_dir(path) and not all(name.startswith(ours) for name in storage.list_files(path, ("",))):
        raise RunError(
            "the output folder is not empty and not a run", where=path, hint="choose another folder with --set out=DIR"
        )


def _short(value: str | None) -> str:
    text = "none" if value is None else value
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
