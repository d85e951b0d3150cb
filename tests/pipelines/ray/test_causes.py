"""What the user can act on is found inside of wrappers; what nobody can act on is left as it is."""

from __future__ import annotations

import errno

import pytest

from memscan.errors import InputError
from pipelines.ray.causes import user_error


class Wrapper(Exception):
    """As Ray's: holds what it wraps under `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("wrapped")
        self.cause = cause


def caused(error: Exception) -> Exception:
    try:
        raise RuntimeError("outer") from error
    except RuntimeError as outer:
        return outer


MISTAKE = InputError("no such file", where="a")
FULL = OSError(errno.ENOSPC, "No space left on device", "/run/a.parquet")


@pytest.mark.parametrize("error", [MISTAKE, Wrapper(MISTAKE), caused(MISTAKE), Wrapper(caused(Wrapper(MISTAKE)))])
def test_a_mistake_is_found(error: Exception) -> None:
    assert user_error(error) is MISTAKE


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FULL, "/run/a.parquet: No space left on device; make room"),
        (Wrapper(caused(FULL)), "/run/a.parquet: No space left on device; make room"),
        (RuntimeError("write error in a.faiss: No space left on device"), "No space left on device; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded; make room"),
    ],
)
def test_a_full_disk_is_one_line_whoever_says_it(error: Exception, told: str) -> None:
    assert str(user_error(error)).startswith(told)


def test_a_bug_stays_a_bug() -> None:
    assert user_error(caused(KeyError("x"))) is None
    assert user_error(OSError(errno.EIO, "Input/output error")) is None


def test_a_ray_that_is_gone_is_one_line_and_another_trouble_of_its_own_is_not() -> None:
    from ray.exceptions import LocalRayletDiedError, RaySystemError

    for gone in (LocalRayletDiedError(), caused(RaySystemError("Broken pipe"))):
        told = user_error(gone)
        assert told is not None
        assert "Ray's processes died or cannot be reached any more" in str(told)
        assert str(told).endswith("run the same command to resume")
    assert user_error(RaySystemError("a bug")) is None
