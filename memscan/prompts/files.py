"""This module chooses the format of a prompt file by the ending of its name; each file may be compressed."""

from __future__ import annotations

from collections.abc import Callable

from memscan.errors import InputError
from memscan.io.compressed import SUFFIXES as PACKED
from memscan.io.compressed import without_suffix
from memscan.prompts.json_documents import NoCaptions, open_json
from memscan.prompts.json_lines import open_json_lines
from memscan.prompts.parquet import open_parquet
from memscan.prompts.rows import Columns, OpenedFile, RawRow
from memscan.prompts.separated import open_separated
from memscan.prompts.text import open_text

__all__ = ["SUFFIXES", "Columns", "NoCaptions", "OpenedFile", "RawRow", "is_prompt_file", "open_prompt_file"]

_READERS: dict[str, Callable[[str, Columns], OpenedFile]] = {
    ".csv": open_separated,
    ".tsv": open_separated,
    ".jsonl": open_json_lines,
    ".ndjson": open_json_lines,
    ".json": open_json,
    ".txt": open_text,
    ".parquet": open_parquet,
}
SUFFIXES = tuple(_READERS)


def is_prompt_file(name: str) -> bool:
    """Return whether a name ends like those of prompt files."""
    return without_suffix(name).lower().endswith(SUFFIXES)


def open_prompt_file(path: str, columns: Columns) -> OpenedFile:
    """Open a prompt file by the ending of its name.

    Raises:
        InputError: unknown ending, unreadable, not what its ending says, or without the caption column. Reading the
            batches may raise it too, where a file breaks off in the middle.
    """
    plain = without_suffix(path).lower()
    for ending, reader in _READERS.items():
        if plain.endswith(ending):
            return reader(path, columns)
    known = f"known endings: {', '.join(SUFFIXES)}, and {', '.join(PACKED)} after them"
    raise InputError("unknown kind of prompt file", where=path, hint=known)
