"""`make test` asks for a browser and goes on without one: one line, never a failure."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("browser.sh")
SAYS_NO = "#!/bin/sh\necho 'E: Unable to locate package chromium' >&2\nexit 100\n"


def said(folder: Path, **programs: str) -> str:
    """What the script says where these programs are the only ones besides the shell's."""
    for name in ("sh", "mktemp", "timeout", "grep", "tail", "rm"):
        path = shutil.which(name)
        assert path is not None
        (folder / name).symlink_to(path)
    for name, text in programs.items():
        file = folder / name.replace("_", "-")
        file.write_text(text)
        file.chmod(0o755)
    done = subprocess.run(
        [str(folder / "sh"), str(SCRIPT)], env={"PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        ({}, "there is no apt-get"),
        ({"apt_get": SAYS_NO, "id": "#!/bin/sh\necho 1000\n"}, "needs root"),
        ({"apt_get": SAYS_NO, "id": "#!/bin/sh\necho 0\n"}, "E: Unable to locate package chromium"),
    ],
)
def test_where_there_can_be_none_one_line_says_why(tmp_path: Path, programs: dict[str, str], words: str) -> None:
    text = said(tmp_path, **programs)
    assert text.count("\n") == 1
    assert words in text


def test_where_there_is_one_nothing_is_said(tmp_path: Path) -> None:
    assert said(tmp_path, chromium="#!/bin/sh\n", chromedriver="#!/bin/sh\n", apt_get=SAYS_NO) == ""


def test_what_was_installed_is_said(tmp_path: Path) -> None:
    """apt-get is asked for both packages."""
    note = tmp_path / "asked"
    text = said(tmp_path, apt_get=f'#!/bin/sh\necho "$@" >> {note}\n', id="#!/bin/sh\necho 0\n")
    assert text.startswith("installed")
    assert note.read_text().splitlines()[-1].endswith("install chromium chromium-driver")
