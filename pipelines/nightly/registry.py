"""This module finds the checkpoints that a nightly watches: in folders, under s3:// prefixes, and in hub repositories.

Only listings are read to find them, so a hundred old checkpoints cost one listing per night. A candidate's `stamp`
changes whenever its files change. If a stamp was seen before, there is nothing to do.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memscan.census.policy import SourceConfig
from memscan.config import GeneratorConfig, LoraConfig
from memscan.errors import InputError, MemscanError
from memscan.io import storage
from memscan.models.specification import HASHED_SUFFIXES

MARK = "model_index.json"
# Files that hold a model's weights; what trainers keep beside them (optimizer.bin, scheduler.bin) is none.
_WEIGHTS = re.compile(
    r".*\.(safetensors|ckpt|gguf)|(pytorch_model|diffusion_pytorch_model|pytorch_lora_weights).*\.bin"
)
_TRAINED = re.compile(r"(unet|transformer|text_encoder|controlnet)(_\w+)?")


@dataclass(frozen=True)
class Candidate:
    """This is a checkpoint that is there.

    Args:
        name: below its source; of a hub revision, the ref's name.
        source: the watched folder, prefix or repository.
        path, revision: as in `GeneratorConfig`; of a LoRA or a single file, the file.
        stamp: 16 hex digits of its files' names, sizes and times, or of the commit.
    """

    name: str
    source: str
    path: str
    revision: str | None
    stamp: str
    kind: Literal["checkpoint", "part", "lora", "file"] = "checkpoint"

    def generator(self, panel: GeneratorConfig) -> GeneratorConfig:
        """Return the panel's generator with this checkpoint, alone or on the panel's base."""
        if self.kind == "lora":
            loras = [*panel.loras, LoraConfig(path=self.path)]
            return panel.model_copy(update={"path": panel.base, "base": None, "loras": loras})
        base = panel.base if self.kind in ("part", "file") else None
        return panel.model_copy(update={"path": self.path, "revision": self.revision, "base": base})

    @property
    def slug(self) -> str:
        """This is a file name for the checkpoint.

        Names repeat and files change, so it has the name and eight digits of a hash of everything.
        """
        digest = hashlib.sha256(f"{self.source}\0{self.name}\0{self.stamp}".encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', self.name).strip('._-')[:80] or 'checkpoint'}-{digest[:8]}"


@dataclass(frozen=True)
class Stranger:
    """These are weights under a watched folder that are no checkpoint, and so are never scanned.

    Args:
        name: of the folder or file, below its source.
        what: what it is, by its name, and what to do about it.
    """

    name: str
    what: str


@dataclass(frozen=True)
class HubRevision:
    """This is one ref of a hub repository; lists of them begin with the oldest."""

    name: str
    commit: str


# Repository and "tags", "branches" or "commits" -> revisions, oldest first.
HubListing = Callable[[str, str], Sequence[HubRevision]]


def find(sources: Sequence[SourceConfig], hub: HubListing | None = None) -> list[Candidate]:
    """Return all checkpoints of the sources, in the order of their scans.

    Within a folder or prefix that is by name, numbers by value (step-900 before step-1000); on the hub, oldest first.

    Raises:
        InputError: a folder or prefix is not there.
        MemscanError: the hub or the storage does not answer.
    """
    return [candidate for source in sources for candidate in _of(source, hub or list_hub)]


def strangers(sources: Sequence[SourceConfig]) -> list[Stranger]:
    """Return, by name, what lies under the watched folders and prefixes and looks like weights, but is no checkpoint.

    A nightly that passes must not have looked past a model. What is to be left out is left out by `match`, which holds
    for names here as well.
    """
    found: list[Stranger] = []
    for path in dict.fromkeys(source.path for source in sources if source.path is not None):
        watches = [source for source in sources if source.path == path]
        names = storage.stamps(path)
        # A folder may be watched for several kinds: what one of them knows is no stranger.
        seen = [{one.name: one for one in _strange(names, kind)} for kind in {source.kind for source in watches}]
        common = sorted(set.intersection(*(set(one) for one in seen)))
        patterns = [source.match for source in watches]
        found += [seen[0][name] for name in common if any(fnmatch.fnmatchcase(name, one) for one in patterns)]
    return found


def _strange(names: Iterable[str], kind: str = "checkpoint") -> list[Stranger]:
    listed = sorted(names)
    if kind != "checkpoint":
        known = set(_parts(listed) if kind == "part" else _files(listed))
        inside = tuple(f"{one}/" for one in known)
        listed = [name for name in listed if name not in known and not name.startswith(inside)]
    roots = {name.removesuffix(MARK).rstrip("/") for name in listed if name.rsplit("/", 1)[-1] == MARK}
    found: dict[str, str] = {}
    for name in listed:
        *folders, file = name.split("/")
        if not _WEIGHTS.fullmatch(file) or any(folder.startswith(".") for folder in folders):
            continue
        above = ["/".join(folders[:depth]) for depth in range(len(folders) + 1)]
        inner = max((root for root in above if root in roots), key=len, default=None)
        below = folders if inner is None else folders[len(inner.split("/")) if inner else 0 :]
        # A checkpoint's own files lie in it or in a folder of a part; a trainer's checkpoints lie deeper.
        if inner is not None and not any(folder.startswith("checkpoint-") for folder in below):
            continue
        if folders and _TRAINED.fullmatch(folders[-1]):
            unit = "/".join(folders[:-1]) or "."
            found[unit] = "is a training checkpoint with a part only: watch it with kind part, on generator.base"
        elif "lora" in file.lower() or file.startswith("adapter_model"):
            found[name] = "is a LoRA: watch it with kind lora, on generator.base"
        else:
            way = "watch it with kind file, on generator.base" if file.endswith(".safetensors") else "convert it"
            found[name] = f"is a single file: {way}"
    if kind != "checkpoint":
        found |= {root or ".": f"is a whole checkpoint, and this watch is of kind {kind}" for root in roots}
    return [Stranger(unit, f"{what}, or leave it out by watch.match") for unit, what in found.items()]


def _parts(names: Sequence[str]) -> list[str]:
    """Folders of a trained denoiser: with weights and a configuration, below no checkpoint's own parts.

    Where a text encoder was trained with the only denoiser, it is the folder of both.
    """
    folders = {name.rpartition("/")[0] for name in names if name.endswith("/config.json")}
    trained = [one for one in sorted(folders) if re.fullmatch(r"(unet|transformer)(_\w+)?", one.rpartition("/")[2])]
    found = [one for one in trained if f"{one.rpartition('/')[0]}/{MARK}".lstrip("/") not in names]
    above = [one.rpartition("/")[0] for one in found]
    both = {one for one, inside in zip(above, _inside(above), strict=True) if f"{inside}text_encoder" in folders}
    return [
        parent if parent in both and above.count(parent) == 1 else one for one, parent in zip(found, above, strict=True)
    ]


def _inside(folders: Iterable[str]) -> list[str]:
    """Return what the names of files in these folders begin with; all names do for the watched folder itself, ""."""
    return [f"{one}/" if one else "" for one in folders]


def _files(names: Sequence[str]) -> list[str]:
    """Safetensors files that lie in no folder of a model or of one of its parts."""
    models = {name.rpartition("/")[0] for name in names if name.rsplit("/", 1)[-1] in (MARK, "config.json")}
    inside = tuple(_inside(models))
    return [name for name in names if name.endswith(".safetensors") and not name.startswith(inside)]


def _of(source: SourceConfig, hub: HubListing) -> list[Candidate]:
    if source.hub is not None:
        found = [
            Candidate(one.name, source.hub, source.hub, one.commit, _digest({"commit": one.commit}))
            for one in hub(source.hub, source.refs)
        ]
    else:
        assert source.path is not None
        found = sorted(_below(source.path, source.kind), key=lambda candidate: _by_value(candidate.name))
    return [candidate for candidate in found if fnmatch.fnmatchcase(candidate.name, source.match)]


def _below(path: str, kind: Literal["checkpoint", "part", "lora", "file"] = "checkpoint") -> list[Candidate]:
    if not storage.is_dir(path):
        raise InputError("no such folder", where=path, hint="see watch.path")
    stamps = storage.stamps(path)
    if kind == "part":
        return [replace(_candidate(path, part, stamps), kind=kind) for part in _parts(sorted(stamps))]
    if kind in ("lora", "file"):
        return [
            Candidate(name, path, storage.join(path, name), None, _digest({name: stamps[name]}), kind)
            for name in _files(sorted(stamps))
        ]
    roots = sorted(name.removesuffix(MARK).rstrip("/") for name in stamps if name.rsplit("/", 1)[-1] == MARK)
    return [_candidate(path, root, stamps) for root in roots]


def _candidate(path: str, root: str, stamps: dict[str, str]) -> Candidate:
    prefix = f"{root}/" if root else ""
    own = {
        name.removeprefix(prefix): stamp
        for name, stamp in stamps.items()
        if name.startswith(prefix) and name.endswith(HASHED_SUFFIXES)
    }
    name = root or path.rstrip("/").rsplit("/", 1)[-1]
    return Candidate(name, path, storage.join(path, root), None, _digest(own))


def _digest(content: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _by_value(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() and part.isascii() else (0, 0, part) for part in parts]


def list_hub(repository: str, refs: str) -> list[HubRevision]:
    """Return the revisions of a repository on the Hugging Face hub. Raises MemscanError if the hub does not answer."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if refs == "commits":
            commits = api.list_repo_commits(repository)
            return [HubRevision(one.commit_id[:12], one.commit_id) for one in reversed(list(commits))]
        found = api.list_repo_refs(repository)
        named = found.tags if refs == "tags" else found.branches
        order = {one.commit_id: at for at, one in enumerate(reversed(list(api.list_repo_commits(repository))))}
        revisions = [HubRevision(one.name, one.target_commit) for one in named]
        return sorted(revisions, key=lambda one: (order.get(one.commit, len(order)), one.name))
    except Exception as error:  # the hub client raises its own, httpx's and OSError kinds
        line = " ".join(str(error).split())[:200]
        raise MemscanError(
            f"cannot list {refs} ({type(error).__name__}: {line})",
            where=repository,
            hint="check the network and the id",
        ) from error
