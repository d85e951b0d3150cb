from __future__ import annotations

import pickle

import pytest

from memscan import errors
from memscan.errors import MemscanError, Reason, RowReject

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MemscanError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_process_borders(kind: type[MemscanError]) -> None:
    error = pickle.loads(pickle.dumps(kind("is broken", where="a.csv", hint="mend it")))
    assert type(error) is kind
    assert (error.what, error.where, error.hint) == ("is broken", "a.csv", "mend it")
    assert str(error) == "a.csv: is broken; mend it"
    assert error.exit_code != 0


def test_an_error_is_one_line() -> None:
    assert "\n" not in str(MemscanError("first\nsecond", where="a\nb", hint="do\nthis"))
    assert str(MemscanError("is broken")) == "is broken"


def test_row_reject_crosses_process_borders_and_is_bounded() -> None:
    reject = pickle.loads(pickle.dumps(RowReject(Reason.IMAGE_TOO_LARGE, "line\n" * 1000)))
    assert reject.reason is Reason.IMAGE_TOO_LARGE
    assert "\n" not in reject.message
    assert len(reject.message) <= 500


def test_reason_codes_are_stable() -> None:
    """Other people's queries contain these; append, never rename."""
    assert [reason.value for reason in Reason][:14] == [
        "caption_empty",
        "caption_too_long",
        "caption_not_utf8",
        "row_malformed",
        "image_undecodable",
        "image_too_large",
        "image_missing",
        "generation_failed",
        "generation_not_finite",
        "segmentation_failed",
        "embedding_failed",
        "search_failed",
        "reference_missing",
        "classification_failed",
    ]
