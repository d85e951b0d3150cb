"""The rules of the house, checked on the source: who may import whom, how long a file may be, what the README shows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450

# A module may import its own layer and those above it in this list; `models` and `metric` are siblings.
LAYERS = (
    {"records", "errors", "config", "storage", "s3", "s3_arrow", "prompts", "prompt_files", "images", "watch"}
    | {"redaction", "validation"},
    {"models", "metric"},
    {"index", "detection", "localization", "clustering", "census", "rates", "flagged", "comparison", "trend"}
    | {"screened_census", "signals", "correspondence", "duplicates", "differences", "reached", "planning"},
    {"mitigation", "report", "planted", "evaluation"},
)
LIBRARY = sorted((ROOT / "memscan").rglob("*.py"))
JOBS = sorted((ROOT / "pipelines").rglob("*.py"))
SOURCES = [*LIBRARY, *JOBS, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the import stands; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_sources_to_check() -> None:
    assert len(LIBRARY) > 10
    assert len(JOBS) > 3


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_knows_no_engine(path: Path) -> None:
    roots = {module.partition(".")[0] for module in imports(path)}
    assert not roots & {"ray", "pipelines"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_pickle(path: Path) -> None:
    assert not {module.partition(".")[0] for module in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib"}


def layer_of(module: str) -> int | None:
    return next((number for number, layer in enumerate(LAYERS) if module in layer), None)


@pytest.mark.parametrize("path", [p for p in LIBRARY if p != ROOT / "memscan" / "__init__.py"], ids=name_of)
def test_import_direction(path: Path) -> None:
    own = path.relative_to(ROOT / "memscan").with_suffix("").parts[0]
    level = layer_of(own)
    assert level is not None, f"memscan/{own} has no layer: add it to LAYERS"
    for module in imports(path):
        root, _, rest = module.partition(".")
        if root == "memscan":
            target = rest.partition(".")[0]
            below = layer_of(target)
            assert below is None or below <= level, f"imports memscan.{target}, which stands above it"


def test_importing_memscan_is_cheap() -> None:
    heavy = {"torch", "pyarrow", "pydantic", "diffusers", "ray"}
    code = f"import sys, memscan; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    import memscan

    for name in memscan.__all__:
        assert getattr(memscan, name) is not None
        assert name in dir(memscan)
    with pytest.raises(AttributeError):
        _ = memscan.no_such_name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


@pytest.mark.parametrize("path", [*LIBRARY, *JOBS], ids=name_of)
def test_module_tells_its_idea(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body


@pytest.mark.parametrize("top", ["memscan", "pipelines"])
def test_every_folder_of_modules_is_a_package(top: str) -> None:
    """The wheel takes packages only: modules in a folder without `__init__.py` would be missing from it."""
    folders = {path.parent for path in (ROOT / top).rglob("*.py")}
    assert not [name_of(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_readme_shows_the_two_commands() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md here")
    text = readme.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


def test_constraints_pin_every_dependency() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None
        assert name.group().lower() in pins, f"{requirement} is not pinned in constraints.txt"
    assert not [version for version in pins.values() if "+" in version], "local versions install nowhere else"
