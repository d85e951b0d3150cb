"""What mkdocs does beside its own: pages from outside of docs/ become pages of the site, and links lead to them.

In the repository `docs/metric.md` says `../examples/nightly.yaml` and README says `docs/metric.md`; both lead somewhere
there, and on the site. `docs/index.md`, the page on the index, makes way for README, which is the site's first page.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Where a file of the repository stands on the site; everything else stands where it does in docs/, or at its own path.
MOVED = {"README.md": "index.md", "docs/index.md": "index-of-references.md"}
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "ray_cluster.yaml")
FOLDERS = ("cluster/", "examples/")
# A fence says what the tests do with a block (`run`, `output`, `step`), which the site's Markdown knows nothing of.
FENCE = re.compile(r"\A(```\w+) \w+$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside of docs/, and put `docs/index.md` elsewhere."""
    own = files.get_file_from_path("index.md")
    if own is not None:
        files.remove(own)
    for path in _outside():
        files.append(File.generated(config, site_place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of a page as they are on the site; what is not on it is shown by its name."""
    here = in_repository(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        text, target = match.groups()
        place, sign, anchor = target.partition("#")
        if "://" in target or not place or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), place))
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        known = files.get_file_from_path(site_place(path))
        if known is None:
            return text
        return (
            f"[{text}]({posixpath.relpath(known.src_uri, posixpath.dirname(page.file.src_uri) or '.')}{sign}{anchor})"
        )

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    whole = [FENCE.sub(r"\1", part) if part.startswith("```") else LINK.sub(led, part) for part in parts]
    return "".join(whole).replace("](docs/images/", "](images/")


def site_place(path: str) -> str:
    """Where a file of the repository stands on the site."""
    return MOVED.get(path, path.removeprefix("docs/"))


def in_repository(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    back = {site: path for path, site in MOVED.items()}
    return back.get(uri, uri if (ROOT / uri).exists() else f"docs/{uri}")


def _outside() -> list[str]:
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = listed.splitlines() or [
        file.relative_to(ROOT).as_posix() for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()
    ]
    return [*OUTSIDE, "docs/index.md", *(path for path in found if (ROOT / path).is_file())]
