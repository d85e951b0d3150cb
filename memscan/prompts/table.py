"""Prompts: every caption of the input normalised, folded with its duplicates, and counted.

A row that holds no usable caption becomes a rejected row with its reason, so the counts of the table always add up to
the rows that were read; files that are not taken are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from memscan.config import PromptsConfig
from memscan.errors import InputError
from memscan.io.listing import NotTaken
from memscan.prompts.captions import normalise
from memscan.prompts.files import Columns, NoCaptions, open_prompt_file
from memscan.prompts.folders import find_prompt_files
from memscan.prompts.folding import Fold

__all__ = ["PromptSource", "PromptTable", "normalise", "read_prompts"]


@dataclass(frozen=True)
class PromptSource:
    """What one input file gave, and how it was read (`rows.OpenedFile` has the meaning of the rest)."""

    path: str
    rows: int
    rejected: int
    caption_column: str | None
    separator: str | None
    format: str = ""
    url_column: str | None = None
    kin: tuple[str, ...] = ()
    quoting: str | None = None
    several: bool = False


@dataclass(frozen=True)
class PromptTable:
    """The prompts of a census: `sum(table["count"]) == rows_read`.

    Attributes:
        table: `records.PROMPTS`, in the order of first appearance; `url` is the first that any duplicate had.
        rows_read: input rows, good and bad.
        sources: the files they came from, in the order of reading.
        not_taken: files of the folders that are no prompt files.
        distinct: prompts that are not rejects.
        reasons: rejected rows by reason.
    """

    table: pa.Table
    rows_read: int
    sources: tuple[PromptSource, ...]
    not_taken: tuple[NotTaken, ...] = ()
    distinct: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)


def read_prompts(config: PromptsConfig) -> PromptTable:
    """Read prompt files, folders of them, and patterns into one table of distinct prompts.

    With `limit`, reading stops at the row that brings the last prompt allowed; later rows are not counted.

    Raises:
        InputError: a path is missing, empty or of an unknown kind, a file lacks the caption column, or there is no row.
    """
    fold = Fold(config.max_chars, config.limit)
    columns = Columns(config.caption_column, config.url_column, config.header)
    sources: list[PromptSource] = []
    found = find_prompt_files(config.paths)
    not_taken = list(found.not_taken)
    for path, named in found.files:
        try:
            opened = open_prompt_file(path, columns)
        except NoCaptions as error:
            if named:
                raise
            not_taken.append(NotTaken(path, error.what))
            continue
        rows, rejected = fold.add(path, opened.batches)
        if rows == 0 and named:
            raise InputError("is empty: it has no rows", where=path)
        sources.append(
            PromptSource(
                path,
                rows,
                rejected,
                opened.caption_column,
                opened.separator,
                opened.format,
                opened.url_column,
                opened.kin,
                opened.quoting,
                opened.several,
            )
        )
        if fold.full:
            break
    if fold.rows_read == 0:
        raise InputError("no prompts", where=", ".join(config.paths))
    return PromptTable(fold.table(), fold.rows_read, tuple(sources), tuple(not_taken), fold.distinct(), fold.reasons)
