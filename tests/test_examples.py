"""Every configuration in examples/ is one that memscan accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from memscan.census.policy import load_watch
from memscan.config import load_config

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.yaml"))
WATCH = FOLDER / "nightly.yaml"
CENSUSES = [path for path in FILES if path != WATCH]


def test_there_are_examples() -> None:
    assert len(FILES) >= 3


@pytest.mark.parametrize("path", CENSUSES, ids=lambda path: path.stem)
def test_example_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem or config.name == "sd14-laion"
    assert config.index.source is not None
    assert "published" not in config.metric.threshold_source or config.metric.canvas == 512


def test_watch_example_loads_with_its_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    watch = load_watch(WATCH)
    assert watch.panel().generator.samples >= 1
    assert watch.webhook is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_is_explained(path: Path) -> None:
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").startswith("# ")
