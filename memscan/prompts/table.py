"""This module makes the prompt table.

Every caption of the input is normalised, folded with its duplicates, and counted.

A row that holds no usable caption becomes a rejected row with its reason, so the counts of the table always add up to
the rows that were read; files that are not taken are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa

from memscan.config import PromptsConfig
from memscan.errors import InputError
from memscan.io.listing import NotTaken
from memscan.prompts.captions import normalise
from memscan.prompts.files import Columns, NoCaptions, open_prompt_file
from memscan.prompts.folders import find_prompt_files
from memscan.prompts.folding import Fold, Folded
from memscan.records import PROMPTS

__all__ = ["PromptSource", "PromptTable", "normalise", "read_prompts"]


@dataclass(frozen=True)
class PromptSource:
    """This says what one input file gave, and how it was read (`rows.OpenedFile` explains the rest)."""

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
    """These are the prompts of a census, in the order of first appearance; their `count` adds up to `rows_read`.

    Prompts that do not fit into memory are on disk while this object lives.

    Attributes:
        content: the prompts; of type `records.PROMPTS` where they are a table. `url` is the first of any duplicate.
        rows_read: input rows, good and bad.
        sources: the files they came from, in the order of reading.
        not_taken: files of the folders that are not prompt files.
        distinct: prompts that are not rejects.
        reasons: rejected rows by reason.
    """

    content: pa.Table | Folded
    rows_read: int
    sources: tuple[PromptSource, ...]
    not_taken: tuple[NotTaken, ...] = ()
    distinct: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """This is the number of prompts and rejects."""
        return int(self.content.num_rows)

    @cached_property
    def table(self) -> pa.Table:
        """Return all of them as one table in memory."""
        if isinstance(self.content, pa.Table):
            return self.content
        return pa.concat_tables([PROMPTS.empty_table(), *self.content.tables()]).combine_chunks()

    def parts(self, rows: int) -> Iterator[pa.Table]:
        """Yield the same in tables of this number of rows, the last one shorter; one of them is in memory at a time."""
        waiting: list[pa.Table] = []
        held = 0
        for table in [self.content] if isinstance(self.content, pa.Table) else self.content.tables():
            waiting.append(table)
            held += table.num_rows
            while held >= rows:
                together = pa.concat_tables(waiting)
                yield together.slice(0, rows).combine_chunks()
                waiting, held = [together.slice(rows)], held - rows
        if held:
            yield pa.concat_tables(waiting).combine_chunks()


def read_prompts(config: PromptsConfig, scratch: str | None = None) -> PromptTable:
    """Read prompt files, folders of them, and patterns into one table of distinct prompts.

    With `limit`, reading stops at the row with the last allowed prompt, and later rows are not counted. Memory is at
    most about .8 GiB for any number of prompts: those beyond a million are written to disk in the meantime.

    Args:
        scratch: local folder for these prompts, about 150 bytes for each; by default the system's folder for temporary
            files.

    Raises:
        InputError: a path is missing, empty or of an unknown kind, a file lacks the caption column, or there is no row.
    """
    fold = Fold(config.max_chars, config.limit, scratch)
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
    folded = fold.finish()
    return PromptTable(folded, fold.rows_read, tuple(sources), tuple(not_taken), folded.distinct, fold.reasons)
