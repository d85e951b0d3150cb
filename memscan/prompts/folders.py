"""This module decides which files of the configured paths are prompt files, and which are not taken.

A path may be a file, a folder, or a pattern (`io/patterns.py`). In a folder, files are taken by the ending of their
name; files that describe a data set (README, LICENSE ...) are not taken, even as `.txt`, and hidden files are not
either.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from memscan.errors import InputError
from memscan.io import storage
from memscan.io.compressed import SUFFIXES as PACKED
from memscan.io.listing import NotTaken
from memscan.io.patterns import expand_all
from memscan.prompts.files import SUFFIXES, is_prompt_file

_ABOUT = re.compile(
    r"(readme|licen[sc]e|notice|copying|copyright|authors|contributors|contributing|citation|changelog|changes|requirements|"
    r"terms|terms_of_use|disclaimer|dataset_?infos?|dataset_dict|state)([-_.].*)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PromptFiles:
    """These are the files of the configured paths, each once, in the order of reading.

    Attributes:
        files: path, and whether it was named itself rather than found in a folder.
        not_taken: other files of the folders.
    """

    files: tuple[tuple[str, bool], ...]
    not_taken: tuple[NotTaken, ...]


def find_prompt_files(paths: Sequence[str]) -> PromptFiles:
    """Examine paths.

    Raises:
        InputError: one is missing, a pattern finds nothing, or a folder has no prompt file.
    """
    files: dict[str, tuple[str, bool]] = {}
    not_taken: dict[str, NotTaken] = {}
    for path in expand_all(paths):
        if not storage.is_dir(path):
            files.setdefault(_identity(path), (path, True))
            continue
        taken = []
        for file in storage.list_files(path, ("",), hidden=True):
            why = _why_not(file.rpartition("/")[2])
            if why is None:
                taken.append(file)
            else:
                not_taken.setdefault(file, NotTaken(file, why))
        if not taken:
            known = f"known endings: {', '.join(SUFFIXES)}, and {', '.join(PACKED)} after them"
            raise InputError("no prompt files in this folder", where=path, hint=known)
        for file in taken:
            files.setdefault(_identity(file), (file, False))
    return PromptFiles(tuple(files.values()), tuple(not_taken.values()))


def _why_not(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    if not is_prompt_file(name):
        return "no ending of a prompt file"
    if name.lower().endswith((".txt", ".json")) and _ABOUT.fullmatch(name.rpartition(".")[0]):
        return "describes a data set"
    return None


def _identity(file: str) -> str:
    return file if storage.is_remote(file) else os.path.realpath(file)
