"""This module describes every key of a configuration, from the pydantic models.

It has two forms: the page docs/configuration.md, and a JSON Schema, from which editors complete and check a YAML file.
Because both are generated, neither can differ from the code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from memscan.config.census import CHECKS, PLACE, REDUCE_ONLY, RESOURCES, CensusConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_HEAD = """# Configuration

This page lists every key of a configuration, of a nightly's watch file, of the policy of a repair, and of the option
`--set` of the commands for repair. `memscan config reference` generates it from the code; do not edit it.

One YAML file describes a census. [examples/](../examples/) has commented files, and `memscan config init` writes a
first one for the model, prompts and images on your disk. Any key can be given on the command line too:
`--set generator.steps=20`. An unknown key is refused, and the message names the most similar valid key.

`memscan config schema` prints the JSON Schema. An editor with a YAML language server uses it to complete and check
keys if the file begins with `# yaml-language-server: $schema=census.schema.json`.

The column *counts for* says what changes with a key:

* **fingerprint**: the key decides what a scan finds. It is part of the run's fingerprint, and a run that was begun with
  one value is not resumed with another.
* **resources**: the key decides only how fast a scan is, and on which devices. It may change between a stop and a
  resume.
* **reduce**: only `memscan reduce` reads the key. You can reduce again with another value (`--config`) without a new
  scan.
* **check**: the key decides whether something is checked before the scan. It does not change the results.
* **place**: the key names the run or its folder, and nothing else.
"""


@dataclass(frozen=True)
class Key:
    """This describes one key: its dotted name, its type, default and description in words, and what it counts for."""

    name: str
    type: str
    default: str
    description: str
    counts_for: str


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    return {"$schema": DIALECT, **model.model_json_schema()}


def counts_for(name: str) -> str:
    """Return what a key of a census counts for: "fingerprint", "resources", "reduce", "check" or "place"."""
    if name in CHECKS:
        return "check"
    section = name.partition(".")[0]
    if section in PLACE:
        return "place"
    if section in RESOURCES:
        return "resources"
    return "reduce" if section in REDUCE_ONLY else "fingerprint"


def sections(model: type[BaseModel]) -> Iterator[tuple[str, str, list[Key]]]:
    """Yield name, description and keys of each section; the keys outside of sections come first, with the name ""."""
    whole = model.model_json_schema()
    yield from _sections(whole, whole.get("$defs", {}), "", "")


def _sections(
    found: Mapping[str, Any], definitions: Mapping[str, Any], name: str, description: str
) -> Iterator[tuple[str, str, list[Key]]]:
    keys, below = [], []
    for key, described in found["properties"].items():
        full = f"{name}.{key}" if name else key
        target = _section_of(described, definitions)
        if target is not None:
            # pydantic leaves out a description that the section itself has.
            below.append((target, full, described.get("description", target["description"])))
            continue
        required = key in found.get("required", ())
        default = "required" if required else _value(described.get("default"))
        keys.append(Key(full, type_of(described, definitions), default, described["description"], counts_for(full)))
    if keys:
        yield name, description, keys
    for target, full, words in below:
        yield from _sections(target, definitions, full, words)


def _section_of(described: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the section that a key holds, alone or in a list; None for a key with a value."""
    for one in [described, described.get("items", {}), *described.get("anyOf", ())]:
        reference = one.get("$ref")
        if reference is not None:
            target: Mapping[str, Any] = definitions[reference.rpartition("/")[2]]
            return target
    return None


def type_of(described: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return the type of a value in words, with its bounds."""
    if "anyOf" in described:
        kinds = [type_of(one, definitions) for one in described["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in described:
        return ", ".join(f"`{one}`" for one in described["enum"])
    if "const" in described:
        return f"`{described['const']}`"
    kind = described.get("type", "value")
    if kind == "array":
        inner = described.get("prefixItems", [described.get("items", {})])
        return f"list of {type_of(inner[0], definitions)}" + (f", {len(inner)} of them" if len(inner) > 1 else "")
    if kind == "object":
        names = described.get("propertyNames", {})
        return f"mapping ({type_of(names, definitions)} to number)" if names else "mapping"
    words = {"string": "text", "boolean": "true or false", "integer": "integer", "number": "number"}
    bounds = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    limits = [f"{sign} {described[bound]:g}" for bound, sign in bounds if bound in described]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def _value(default: Any) -> str:
    if default is None:
        return "not given"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


@dataclass(frozen=True)
class Part:
    """This is a part of the page about keys that are not those of a census: of another file, or of an option.

    Args:
        title: the heading of the part.
        words: what is said before its tables, in Markdown.
        top: the heading of the keys that are in no section; "" for none, where every key is such a key.
    """

    title: str
    words: str
    model: type[BaseModel]
    top: str = ""


def page(others: Sequence[Part]) -> str:
    """Return the text of docs/configuration.md: a table per section of a census, and then the other parts."""
    lines = [_HEAD]
    for name, description, keys in sections(CensusConfig):
        lines.append(f"## {f'`{name}`' if name else 'At the top'}\n")
        lines += [f"{description}\n"] if description else []
        lines += ["| key | type | default | counts for | what it does |", "|---|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {key.type} | {key.default} | {key.counts_for} | {_cell(key.description)} |"
            for key in keys
        ]
        lines.append("")
    for part in others:
        lines += [f"# {part.title}\n", f"{part.words}\n"]
        for name, description, keys in sections(part.model):
            heading = f"`{name}`" if name else part.top
            lines += [f"## {heading}\n"] if heading else []
            lines += [f"{description}\n"] if description else []
            lines += ["| key | type | default | what it does |", "|---|---|---|---|"]
            lines += [f"| `{key.name}` | {key.type} | {key.default} | {_cell(key.description)} |" for key in keys]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"
