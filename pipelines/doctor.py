"""This module checks an installation for `memscan doctor`.

It checks packages and devices, and whether models and references are complete.

Every finding says what to do about it. Of the models, only the generator is loaded, for its sanity check.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from pipelines.ray.session import cores
from pipelines.run_folder.inputs import embedder_id, generator_id, prompt_ids, reference_id, segmenter_id

_NEEDED = ("ray", "torch", "diffusers", "transformers", "pyarrow", "onnxruntime", "pydantic", "pillow", "typer", "rich")
_MARKS = {"ok": "ok     ", "absent": "absent ", "bad": "PROBLEM"}
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Finding:
    """This is the result of one check.

    Args:
        area: "software", "devices", "world", "models" or "inputs".
        state: "ok"; "absent", which limits what can be done; "bad", which stops a census.
        hint: what to do about it, "" when ok.
    """

    area: str
    name: str
    state: str
    detail: str
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(config: CensusConfig | None) -> list[Finding]:
    """Examine software and devices, and the files of a configuration, or of the shipped world if none is given."""
    findings = [*_software(), *_devices()]
    return [*findings, *(_files(config) if config is not None else _world())]


def describe(findings: list[Finding]) -> str:
    """Return the findings as text for a person."""
    lines = []
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            lines.append(f"{area}")
        hint = f"; {finding.hint}" if finding.hint else ""
        lines.append(f"  {_MARKS[finding.state]}  {finding.name:<14} {finding.detail}{hint}")
    bad = sum(finding.state == "bad" for finding in findings)
    lines.append("everything a census needs is here" if not bad else f"{bad} problem{'s' if bad > 1 else ''}")
    return "\n".join(lines)


def _software() -> Iterator[Finding]:
    yield Finding("software", "python", "ok", platform.python_version())
    for name in ("memscan", *_NEEDED):
        found = _version(name)
        if found is None and name == "memscan":
            yield Finding("software", name, "absent", "runs from a checkout", "pip install . makes it a command")
        elif found is None:
            yield Finding("software", name, "bad", "not installed", f"pip install {name}")
        else:
            yield Finding("software", name, "ok", found)
    yield _faiss()
    for scheme, driver in (("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")):
        found = _version(driver)
        state = (
            ("ok", found, "") if found else ("absent", f"not installed: no {scheme}:// paths", f"pip install {driver}")
        )
        yield Finding("software", driver, *state)


def _faiss() -> Finding:
    for name in ("faiss-gpu", "faiss-gpu-cu12", "faiss-cpu"):
        if found := _version(name):
            return Finding("software", "faiss", "ok", f"{found} ({name})")
    return Finding("software", "faiss", "bad", "not installed", "pip install faiss-cpu (or faiss-gpu)")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    yield Finding("devices", "cores", "ok", str(cores()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(
        "devices", "memory", "ok" if memory >= 4 else "bad", f"{memory:.1f} GiB", "" if memory >= 4 else "4 GiB"
    )
    disk = shutil.disk_usage(".").free / 2**30
    enough = ("ok", f"{disk:.0f} GiB free", "") if disk >= 1 else ("bad", f"{disk:.1f} GiB free", "make room")
    yield Finding("devices", "disk", *enough)
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY).total / 2**30
        small = shared < 1
        hint = "in a container, start it with --shm-size=2g" if small else ""
        yield Finding("devices", "shared memory", "absent" if small else "ok", f"{shared:.1f} GiB", hint)
    yield from _gpus()


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", "GPU", "absent", f"torch cannot be imported ({error})", "install torch")
        return
    if not torch.cuda.is_available():
        yield Finding("devices", "GPU", "absent", "none that torch can use: the CPU works", "")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding("devices", f"GPU {number}", "ok", detail)


def _files(config: CensusConfig) -> Iterator[Finding]:
    generator = _look("models", "generator", lambda: generator_id(config.generator))
    yield generator
    yield _look("models", "segmenter", lambda: segmenter_id(config.segmenter))
    yield _look("models", "embedder", lambda: embedder_id(config.embedder))
    semantic = config.signals.semantic
    if semantic is not None:
        yield _look("models", "semantic", lambda: embedder_id(semantic, "signals.semantic"))
    yield _look("inputs", "prompts", lambda: f"{len(prompt_ids(config))} files")
    yield _look("inputs", "references", lambda: reference_id(config))
    if generator.state == "ok" and config.generator.sanity != "off":
        from pipelines.scan.sanity import look

        yield _look("models", "sanity", lambda: look(config))
    yield from _instruments(config)


def _instruments(config: CensusConfig) -> Iterator[Finding]:
    """Segmenter and embedder, loaded and asked about images whose answer is known, as every worker does."""

    def segmenter() -> str:
        from memscan.models.probe import probe_segmenter
        from memscan.models.segmenter import load_segmenter

        probe_segmenter(load_segmenter(config.segmenter), config.segmenter.path)
        return "finds plain objects, alone and in batches"

    def embedder() -> str:
        from memscan.models.embedder import load_embedder
        from memscan.models.probe import probe_embedder

        probe_embedder(load_embedder(config.embedder), config.embedder.path)
        return "tells plain images apart, alone and in batches"

    yield _look("models", "segmentation", segmenter)
    yield _look("models", "embedding", embedder)


def _look(area: str, name: str, see: Callable[[], str]) -> Finding:
    try:
        return Finding(area, name, "ok", see())
    except MemscanError as error:
        detail = f"{error.where}: {error.what}" if error.where else error.what
        return Finding(area, name, "bad", detail, error.hint or "")


def _world() -> Iterator[Finding]:
    from memscan.planted.world import check_world, shipped_world

    try:
        checks = check_world()
    except MemscanError as error:
        yield Finding("world", "shipped", "bad", error.what, error.hint or "")
        return
    wrong = [check for check in checks if check.state != "ok"]
    for check in wrong:
        yield Finding("world", check.name, "bad", check.state, "install memscan again, or restore the file")
    if not wrong:
        yield Finding("world", "shipped", "ok", f"{len(checks)} files, all hashes are right ({shipped_world()})")
