"""The rules of the house, checked on the source: who may import whom, how long a file may be, what the README shows."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450
HISTORY = {"CHANGELOG.md", "decisions.md"}

# A package or module of `memscan/` may import its own layer and those above it in this list. Packages of one layer do
# not import each other in circles: `test_no_circles` looks.
LAYERS = (
    {"records", "errors", "redaction", "validation", "vectors", "intervals"},
    {"io", "config", "planning"},
    {"prompts", "sources", "models", "metric"},
    {"index", "detection", "localization", "inspection"},
    {"census"},
    {"mitigation", "worker", "planted"},
    {"report", "evaluation"},
)
# The same for the folders of `pipelines/`.
JOB_LAYERS = (
    {"run_folder"},
    {"ray"},
    {"index"},
    {"scan", "reduce"},
    {"mitigate", "plan"},
    {"nightly", "verify"},
    {"evaluate", "doctor", "starting"},
    {"commands"},
    {"cli"},
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


def test_library_knows_no_engine_and_no_pickle() -> None:
    refused = {"ray", "pipelines", "pickle", "dill", "cloudpickle", "joblib"}
    roots = {name_of(path): {module.partition(".")[0] for module in imports(path)} & refused for path in LIBRARY}
    assert not {path: found for path, found in roots.items() if found}


def rooms(path: Path, top: str) -> set[str]:
    """The packages and modules right below `top` that a file imports."""
    found = {module.split(".")[1] for module in imports(path) if module.partition(".")[0] == top and "." in module}
    return {room for room in found if (ROOT / top / room).is_dir() or (ROOT / top / f"{room}.py").is_file()}


@pytest.mark.parametrize(("top", "layers"), [("memscan", LAYERS), ("pipelines", JOB_LAYERS)])
def test_imports_run_one_way(top: str, layers: tuple[set[str], ...]) -> None:
    level = {room: number for number, layer in enumerate(layers) for room in layer}
    arrows: dict[str, set[str]] = {}
    wrong = []
    for path in sorted((ROOT / top).rglob("*.py")):
        own = path.relative_to(ROOT / top).with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in level, f"{top}/{own} has no layer: add it to the list above"
        others = rooms(path, top) - {own}
        wrong += [f"{name_of(path)} imports {top}.{other}" for other in others if level[other] > level[own]]
        arrows.setdefault(own, set()).update(others)
    assert not wrong
    assert not circles(arrows)


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """What is left when everything that leads nowhere has been taken away: the rooms on a circle, and before one."""
    left = {room: set(targets) for room, targets in arrows.items()}
    while ends := {room for room, targets in left.items() if not targets & left.keys()}:
        left = {room: targets for room, targets in left.items() if room not in ends}
    return set(left)


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert circles({"a": {"b"}, "b": set()}) == set()


def test_importing_memscan_is_cheap() -> None:
    heavy = {"torch", "pyarrow", "pydantic", "diffusers", "ray"}
    code = f"import sys, memscan; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    import memscan

    for name in memscan.__all__:
        exported = getattr(memscan, name)
        assert name in dir(memscan)
        assert name == "__version__" or (callable(exported) and not inspect.isabstract(exported)), name
    with pytest.raises(AttributeError):
        _ = memscan.no_such_name


def test_files_are_short() -> None:
    assert not {name_of(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) >= MAX_LINES}


def test_modules_tell_their_idea() -> None:
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in [*LIBRARY, *JOBS]}
    assert not [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)]


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


def test_files_that_are_named_are_there() -> None:
    """Docs and docstrings name files in backticks; a move leaves no old name behind. What tells of the past may."""
    known = [f"/{name_of(path)}" for path in [*SOURCES, *ROOT.glob("*.py")]]
    pages = [page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if page.name not in HISTORY]
    named = {
        f"{name_of(path)}: {name}"
        for path in [*SOURCES, *pages]
        for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8"))
        if not any(one.endswith(f"/{name}") for one in known)
    }
    assert not named


def test_what_is_named_in_a_file_is_there() -> None:
    """Pages write `folder/file.py: name, name`; each name is defined in a file of that name."""
    lost, seen = set(), 0
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for file, names in re.findall(r"`([\w/]+\.py): ([\w, ]+)`", page.read_text(encoding="utf-8")):
            paths = [path for path in SOURCES if f"/{name_of(path)}".endswith(f"/{file}")]
            text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
            for name in names.split(", "):
                seen += 1
                if not re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.*=", text, re.MULTILINE):
                    lost.add(f"{page.name}: {file}: {name}")
    assert seen > 5
    assert not lost


def test_the_page_of_the_configuration_is_current() -> None:
    from pipelines.commands.config import reference_page

    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference_page(), "run: memscan config reference > docs/configuration.md"
