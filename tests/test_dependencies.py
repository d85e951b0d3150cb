"""Every package that the code imports is declared: what another package happens to bring may go with it tomorrow."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = ("cpu", "gpu", "s3", "cluster")
# Distributions whose name is not that of what is imported.
DISTRIBUTIONS = {
    "PIL": {"pillow"},
    "faiss": {"faiss-cpu", "faiss-gpu"},
    "material": {"mkdocs-material"},
    "skimage": {"scikit-image"},
    "sklearn": {"scikit-learn"},
    "yaml": {"pyyaml"},
}
# Tests that do without are skipped: torchvision pulls a build of torch of its own, and ray[default] has opentelemetry
# only where it exports metrics.
NOT_NEEDED = {"torchvision", "opentelemetry", "datasets"}
_BY_NAME = {"import_module", "importorskip"}


def names(requirements: list[str]) -> set[str]:
    """Distribution names in their normal form."""
    return {normal(re.split(r"[^A-Za-z0-9._-]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(listed) for extra, listed in PROJECT["optional-dependencies"].items()}
WITH_EXTRAS = BASE.union(*(EXTRAS[extra] for extra in EXTRAS if extra != "dev"))
# Subclasses of what an extra has; these modules are imported where the extra is used.
OF_AN_EXTRA = {"memscan/io/s3_answers.py": "s3fs"}
WITH_DEV = WITH_EXTRAS | EXTRAS["dev"]


def imported(tree: ast.AST, *, at_once: bool = False) -> Iterator[str]:
    """Top-level names that a file imports, also by `import_module` and `importorskip`.

    Args:
        at_once: only those that importing the file imports: not in a function, not for type checkers.
    """
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if at_once and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _for_type_checkers(node)):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in _BY_NAME and isinstance(node.args[0].value, str):
                yield node.args[0].value.partition(".")[0]


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def undeclared(top: str, declared: set[str], *, at_once: bool = False) -> dict[str, set[str]]:
    """By file, imported packages that none of the declared distributions provides."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        beside = {one.stem for one in path.parent.glob("*.py")} | {"memscan", "pipelines", "benchmarks", "tests"}
        tree = parsed(path)
        outside = set(imported(tree, at_once=at_once)) - set(sys.stdlib_module_names) - beside
        for package in outside - NOT_NEEDED:
            if not DISTRIBUTIONS.get(package, {normal(package)}) & declared:
                found.setdefault(str(path.relative_to(ROOT)), set()).add(package)
    return found


@pytest.mark.parametrize("top", ["memscan", "pipelines"])
def test_the_wheel_declares_what_it_imports(top: str) -> None:
    assert not undeclared(top, WITH_EXTRAS)
    found = undeclared(top, BASE, at_once=True)
    assert found == {file: {extra} for file, extra in OF_AN_EXTRA.items() if file.startswith(top)}, (
        "an extra may not be there: import it where it is used"
    )


@pytest.mark.parametrize("top", ["tests", "benchmarks"])
def test_development_declares_what_it_imports(top: str) -> None:
    assert not undeclared(top, WITH_DEV)


def test_an_undeclared_import_is_seen() -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import g\n    import_module('h.i')"
    tree = ast.parse(source)
    assert set(imported(tree)) == {"a", "c", "d", "h"}
    assert set(imported(tree, at_once=True)) == {"a"}
    assert undeclared("pipelines", BASE - {"pyyaml"})
