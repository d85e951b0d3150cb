"""This module shows how inputs are read before a run: what is taken, what is not, and what comes out.

The facts of a scan's prompts are kept in run.json, those of an index's sources in its manifest; `memscan inspect` shows
both kinds without a run. No model is loaded. All facts are JSON: plain mappings, lists, text and numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from memscan.config import IndexConfig, PromptsConfig
from memscan.errors import ConfigError, InputError, Reason
from memscan.io.content import HEAD, image_format
from memscan.io.listing import MOST_NAMES, printable, shown
from memscan.io.patterns import expand_all
from memscan.prompts.table import PromptTable, read_prompts
from memscan.sources.configured import configured_source
from memscan.sources.layouts import find_layout
from memscan.sources.reading import ChunkReader, Source, check_images
from memscan.sources.tables import has_images

EXAMPLES = 3
_FILES = 20  # that are listed one by one in what is kept
_SIGNS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}


def prompt_facts(prompts: PromptTable) -> dict[str, Any]:
    """Return how the files of a prompt table were read.

    The keys are `kind`, `rows`, `distinct`, `rejected` (reason -> rows), `files`, `formats`, `not_taken` (up to a
    hundred names), `not_taken_count` and three `examples`.
    """
    files = [
        {
            "name": printable(source.path),
            "format": source.format,
            "rows": source.rows,
            "rejected": source.rejected,
            "caption": source.caption_column,
            "url": source.url_column,
            "kin": list(source.kin),
            "separator": source.separator,
            "quoting": source.quoting,
            "several": source.several,
        }
        for source in prompts.sources
    ]
    alike = Counter(_reading(file) for file in files)
    examples: list[str] = []
    for table in prompts.parts(1000):
        rows = table.select(["caption", "status"]).to_pylist()
        examples += [row["caption"] for row in rows if row["status"] == "done"]
        if len(examples) >= EXAMPLES:
            break
    return {
        "kind": "prompts",
        "rows": prompts.rows_read,
        "distinct": prompts.distinct,
        "rejected": dict(prompts.reasons),
        "taken": len(files),
        "formats": dict(alike),
        "files": files[:_FILES],
        "not_taken": _named(prompts.not_taken),
        "not_taken_count": len(prompts.not_taken),
        "examples": examples[:EXAMPLES],
    }


def inspect_prompts(config: PromptsConfig) -> dict[str, Any]:
    """Read prompts and say how. Raises InputError as `read_prompts`."""
    return prompt_facts(read_prompts(config))


def source_facts(
    source: Source,
    rows: int,
    rejected: Mapping[str, int],
    notes: Sequence[Mapping[str, Any]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return how a source of references was read.

    The keys are `kind`, `images`, `rows`, `rejected` (reason -> rows), `layout`, `files` by kind, `columns`,
    `not_taken`, `cleaned` (texts in which half a surrogate pair was replaced) and `examples`.

    Args:
        rows: references that went in, rejected ones included.
        notes: of chunks: `not_taken` as `listing.shown` gives it, and `cleaned`.
    """
    layout = source.layout
    found = shown(layout.not_taken)
    names = [{**entry, "name": entry["name"].removeprefix(printable(layout.root))} for entry in found["first"]]
    for note in notes:
        names += note["not_taken"]["first"]
    count = found["count"] + sum(note["not_taken"]["count"] for note in notes)
    columns = Counter(", ".join(f"{ours}: {theirs}" for ours, theirs in one.items()) for one in source.columns.values())
    return {
        "kind": "references",
        "images": rows - sum(rejected.values()),
        "rows": rows,
        "rejected": dict(rejected),
        "root": printable(layout.root),
        "layout": layout.kind,
        "files": dict(Counter(layout.kinds)),
        "columns": dict(columns),
        "captions": sum(map(bool, layout.captions)),
        "metadata": [layout.name(file) for file in layout.metadata[:_FILES]],
        "not_taken": [entry["name"] for entry in names[:MOST_NAMES]],
        "not_taken_count": count,
        "not_taken_why": dict(Counter(entry["why"] for entry in names)),
        "cleaned": sum(note["cleaned"] for note in notes),
        "examples": list(examples),
    }


def inspect_references(config: IndexConfig) -> dict[str, Any]:
    """Read all references of a source, without decoding them, and say how. An image is known by its first bytes; what
    is damaged behind them only the building of an index finds.

    Raises:
        InputError: as `configured_source`.
    """
    source = configured_source(config)
    check_images(source)
    reader = ChunkReader(source)
    rows, rejected, ids, examples = 0, Counter[str](), set[int](), list[dict[str, Any]]()
    for chunk in source.chunks().to_pylist():
        for table in reader.batches(chunk):
            for row in table.to_pylist():
                reason = row["reason"] or _fault(row, source)
                if reason is None and (name := hash(row["reference_id"])) in ids:
                    reason = Reason.ID_REPEATED.value
                elif reason is None:
                    ids.add(name)
                    if len(examples) < EXAMPLES:
                        examples.append({"id": row["reference_id"], "caption": row["caption"], "url": row["url"]})
                rejected.update([reason] if reason else [])
            rows += table.num_rows
    note = {"not_taken": shown(reader.not_taken), "cleaned": reader.cleaned}
    return source_facts(source, rows, rejected, [note], examples)


def _fault(row: Mapping[str, Any], source: Source) -> str | None:
    if source.layout.kind == "embeddings" or row["path"]:
        return None
    if row["image"] is None:
        return Reason.IMAGE_MISSING.value
    return None if image_format(row["image"][:HEAD]) else Reason.IMAGE_UNDECODABLE.value


def inspect_paths(
    paths: Sequence[str], prompts: Mapping[str, Any], references: Mapping[str, Any], kind: str | None = None
) -> dict[str, Any]:
    """Say how paths are read, as prompts or as references, whichever they hold.

    Args:
        prompts: further fields of `PromptsConfig`.
        references: further fields of `IndexConfig`.
        kind: "prompts" or "references", or None to find out.

    Raises:
        InputError: they hold neither, or as `read_prompts` and `configured_source`.
        ConfigError: a field has no such value.
    """
    try:
        if (kind or kind_of(paths)) == "prompts":
            return inspect_prompts(PromptsConfig.model_validate({"paths": list(paths), **prompts}))
        configs = [IndexConfig.model_validate({"source": path, **references}) for path in paths]
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["msg"]), where=".".join(map(str, error.errors()[0]["loc"]))) from error
    facts = [inspect_references(config) for config in configs]
    return facts[0] if len(facts) == 1 else _together(facts)


def kind_of(paths: Sequence[str]) -> str:
    """Return whether paths hold "prompts" or "references": images, tars, vectors and tables of images are references.

    Raises:
        InputError: a path is missing.
    """
    for path in expand_all(paths):
        try:
            layout = find_layout(path)
        except InputError:
            continue
        tables = [file for file, kind in zip(layout.files, layout.kinds, strict=True) if kind == "table"]
        if len(tables) < len(layout.files) or any(map(has_images, tables[:3])):
            return "references"
    return "prompts"


def _together(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    for one in facts:
        rejected.update(one["rejected"])
    return {
        "kind": "references",
        "images": sum(one["images"] for one in facts),
        "rows": sum(one["rows"] for one in facts),
        "rejected": dict(rejected),
        "not_taken": [name for one in facts for name in one["not_taken"]][:MOST_NAMES],
        "not_taken_count": sum(one["not_taken_count"] for one in facts),
        "sources": list(facts),
    }


def _named(entries: Iterable[Any]) -> list[str]:
    return [printable(entry.path) for entry in list(entries)[:MOST_NAMES]]


def _reading(file: Mapping[str, Any]) -> str:
    """Return how a file was read, in words."""
    words = [file["format"]]
    if file["separator"]:
        words.append(f"separated by {_SIGNS.get(file['separator'], file['separator'])}")
    if file["quoting"]:
        words.append(
            "quotes are characters" if file["quoting"] == "none" else f"quotes inside are {_QUOTES[file['quoting']]}"
        )
    if file["caption"]:
        words.append(f"caption: {file['caption']}")
    if file["url"]:
        words.append(f"url: {file['url']}")
    if file["kin"]:
        words.append(f"not {', '.join(file['kin'])}")
    return ", ".join(words)


_QUOTES = {"doubled": "doubled", "backslash": "behind a backslash"}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the same for a person, one fact per line."""
    if "sources" in facts:
        return [line for one in facts["sources"] for line in lines(one)]
    told = []
    if facts["kind"] == "prompts":
        told.append(f"prompts       {facts['rows']:,} rows in {facts['taken']:,} files, {facts['distinct']:,} distinct")
        told += [f"read as       {how} ({count:,} files)" for how, count in list(facts["formats"].items())[:10]]
    else:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["files"].items())
        told.append(f"references    {facts['images']:,} images of {facts['rows']:,} rows; files: {kinds}")
        told += [f"columns       {columns} ({count:,} files)" for columns, count in list(facts["columns"].items())[:10]]
    for reason, count in facts["rejected"].items():
        told.append(f"rejected      {reason} {count:,}")
    if facts.get("cleaned"):
        told.append(f"cleaned       {facts['cleaned']:,} texts with half a surrogate pair")
    count = facts["not_taken_count"]
    if count:
        names = ", ".join(facts["not_taken"][:5])
        told.append(f"not taken     {count:,} files: {names}{' ...' if count > 5 else ''}")
    for example in facts["examples"]:
        text = example if isinstance(example, str) else f"{example['id']}: {example['caption'] or 'no caption'}"
        told.append(f"for example   {text[:100]}")
    return told
