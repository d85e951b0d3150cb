"""Values that pass a bound and explode later, and keys that are given twice: refused at once, in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from memscan.census.policy import NightlyConfig, load_watch
from memscan.config import CensusConfig, load_config, parse_config
from memscan.config.reading import PATH_KEYS
from memscan.config.reference import sections
from memscan.errors import ConfigError

MODEL = {"path": "m"}
GOOD: dict[str, Any] = {
    "name": "n",
    "out": "runs/x",
    "prompts": {"paths": ["p.txt"]},
    "index": {"source": "images"},
    "generator": dict(MODEL),
    "segmenter": dict(MODEL),
    "embedder": dict(MODEL),
}


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e300"])
@pytest.mark.parametrize("key", ["resources.watchdog_seconds", "generator.guidance", "metric.foreground_threshold"])
def test_numbers_that_are_none_are_refused(key: str, value: str) -> None:
    if value == "1e300" and key == "generator.guidance":
        value = ".inf"
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        parse_config(GOOD, [f"{key}={value}"])


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\nout: b\ngenerator:\n  path: m\n  steps: 2\n  steps: 3\n")
    with pytest.raises(ConfigError, match="key 'steps' is given twice, again in line 6"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"'generator\.steps' is given twice"):
        parse_config(GOOD, ["generator.steps=2", "generator.steps=3"])


def test_what_looks_like_a_comment_in_an_override_is_a_part_of_it() -> None:
    assert parse_config(GOOD, ["out=runs/exp #3"]).out == "runs/exp #3"
    assert parse_config(GOOD, ["generator.steps=7"]).generator.steps == 7


def test_a_path_at_home_is_there_and_not_in_a_folder_named_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    data = {**GOOD, "out": "~/runs", "prompts": {"paths": ["~/a.csv", "~", "b~c", "./~/d"]}}
    data["generator"] = {"path": "~/models/sd", "negative_prompt": "~/ as a text"}
    config = parse_config(data, ["index.source=~/images"])
    assert (config.out, config.generator.path, config.index.source) == (
        "/home/me/runs",
        "/home/me/models/sd",
        "/home/me/images",
    )
    assert config.prompts.paths == ["/home/me/a.csv", "/home/me", "b~c", "./~/d"]
    assert config.generator.negative_prompt == "~/ as a text"
    with pytest.raises(ConfigError, match=r"out: '~nobody-of-that-name/x' is in a home folder that is not known"):
        parse_config(GOOD, ["out=~nobody-of-that-name/x"])


def test_every_key_that_is_a_path_is_looked_at() -> None:
    """By what the keys say of themselves: those that hold a folder or a file."""
    no_paths = {"name", "revision", "sha256", "id_column", "id_prefix", "match", "token"}
    found = {
        key.name.rpartition(".")[2]
        for model in (CensusConfig, NightlyConfig)
        for _, _, keys in sections(model)
        for key in keys
        if key.type.startswith(("text", "list of text")) and re.search(r"\b(folder|file)", key.description)
    }
    assert found - no_paths == PATH_KEYS - {"census"}  # of a nightly, which may also be written out


def test_a_watch_file_is_at_home_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "watch.yaml"
    path.write_text("name: n\nout: ~/registry\nwatch: [{path: ~/models}]\ncensus: ~/census.yaml\n")
    found = load_watch(path)
    assert (found.out, found.watch[0].path, found.census) == (
        "/home/me/registry",
        "/home/me/models",
        "/home/me/census.yaml",
    )
