"""The page of all keys and the JSON Schema: complete, and right about what a key counts for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from memscan.census.policy import NightlyConfig
from memscan.config import CensusConfig, load_config
from memscan.config.reference import schema, sections

ROOT = Path(__file__).resolve().parents[2]
FULL = ROOT / "memscan" / "planted" / "shipped" / "census.yaml"
KEYS = {key.name: key for _, _, keys in sections(CensusConfig) for key in keys}


def test_a_key_counts_for_what_the_page_says() -> None:
    """Whatever another value is: the fingerprint changes with exactly the keys that are said to be part of it."""
    given = ["screen.threshold=1", "signals.semantic.path=clip", "generator.loras=[{path: one}]"]
    given += ["generator.textual_inversions=[{path: one}]"]
    config = load_config(FULL, given)
    before = config.fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic, of values of another type
        changed = {name: replaced(config, name.split(".")).fingerprint() != before for name in KEYS}
    assert len(changed) > 80
    assert {name for name, other in changed.items() if other} == {
        name for name, key in KEYS.items() if key.counts_for == "fingerprint"
    }


def replaced(model: Any, path: list[str]) -> Any:
    """The model with another value of a key, unchecked."""
    if isinstance(model, list):
        return [replaced(model[0], path)]
    name, *below = path
    before = getattr(model, name)
    value = replaced(before, below) if below else not before if isinstance(before, bool) else "another value"
    return model.model_copy(update={name: value})


@pytest.mark.parametrize("model", [CensusConfig, NightlyConfig])
def test_types_bounds_and_defaults_are_told(model: type[BaseModel]) -> None:
    keys = [key for _, _, found in sections(model) for key in found]
    assert all(key.type not in ("", "value") and key.default and key.description for key in keys)


def test_examples_of_types() -> None:
    assert (KEYS["prompts.paths"].type, KEYS["prompts.paths"].default) == ("list of text", "required")
    assert (KEYS["generator.steps"].type, KEYS["generator.steps"].default) == ("integer ≥ 1", "`50`")
    assert KEYS["screen.audit_share"].type == "number > 0, ≤ 1"
    assert KEYS["embedder.mean"].type == "list of number, 3 of them"
    assert KEYS["generator.dtype"].type == "`float32`, `bfloat16`, `float16`"
    assert KEYS["index.nprobe"].default == "not given"


def test_the_schema_takes_the_examples_and_refuses_mistakes() -> None:
    census = jsonschema.Draft202012Validator(schema(CensusConfig))
    for path in [FULL, *(ROOT / "examples").glob("*.yaml")]:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        checker = jsonschema.Draft202012Validator(schema(NightlyConfig)) if "watch" in data else census
        assert not [error.message for error in checker.iter_errors(data)], path
    data = yaml.safe_load(FULL.read_text(encoding="utf-8"))
    data["generator"]["stepz"] = 3
    assert [list(error.path) for error in census.iter_errors(data)] == [["generator"]]
