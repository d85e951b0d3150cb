"""This module has the errors of memscan, which are of two kinds.

A *user's mistake or a broken input* stops the job: `MemscanError`, printed as one line (what is wrong, where, what to
do) with a non-zero exit code and no traceback. A *row that cannot be processed* never stops the job: it is carried out
of the pipeline as a reject with one of the stable codes in `Reason`; inside a stage it travels as `RowReject`.
"""

from __future__ import annotations

from enum import Enum

from memscan.redaction import redact


class MemscanError(Exception):
    """This is a failure on which the user can act.

    Args:
        what: what is wrong, in one sentence without a final full stop.
        where: the file, row, key or model it concerns.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        # Messages are shown, logged and kept in run.json: no address in them keeps its credentials.
        self.what, self.where, self.hint = redact(what), where and redact(where), hint and redact(hint)
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{head}; {self.hint}" if self.hint else head
        return " ".join(line.split())

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross process borders.
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(kind: type[MemscanError], what: str, where: str | None, hint: str | None) -> MemscanError:
    return kind(what, where=where, hint=hint)


class ConfigError(MemscanError):
    """This error says that a configuration does not validate."""


class InputError(MemscanError):
    """This error says that a prompt file, image folder or table cannot be read as what it should be."""


class ModelError(MemscanError):
    """This error says that a model folder or file is incomplete or of the wrong kind."""


class IntegrityError(MemscanError):
    """Bytes differ from what their manifest promises."""


class IndexLoadError(MemscanError):
    """This error says that a reference index is missing, damaged, or belongs to another embedder."""


class RunError(MemscanError):
    """This error says that a run is in a state that forbids the command (other configuration, not complete, in use)."""


class RejectedError(MemscanError):
    """This error says that a run is complete, but most of its rows were rejected."""

    exit_code = 3


class Reason(str, Enum):
    """These are the stable codes of rejected rows. Codes are never renamed or reused; new ones are appended."""

    CAPTION_EMPTY = "caption_empty"
    CAPTION_TOO_LONG = "caption_too_long"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    ROW_MALFORMED = "row_malformed"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_MISSING = "image_missing"
    GENERATION_FAILED = "generation_failed"
    GENERATION_NOT_FINITE = "generation_not_finite"
    SEGMENTATION_FAILED = "segmentation_failed"
    EMBEDDING_FAILED = "embedding_failed"
    SEARCH_FAILED = "search_failed"
    REFERENCE_MISSING = "reference_missing"
    CLASSIFICATION_FAILED = "classification_failed"
    ROW_TIMED_OUT = "row_timed_out"
    WORKER_DIED = "worker_died"
    ID_REPEATED = "id_repeated"
    SCREEN_FAILED = "screen_failed"

    def __str__(self) -> str:
        return self.value


class RowReject(Exception):
    """This error says that one row cannot be processed. Its neighbours can.

    Args:
        reason: the stable code.
        message: one line for a person, at most a few hundred characters.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason, self.message = reason, redact(" ".join(message.split()))[:500]
        super().__init__(f"{reason.value}: {self.message}")

    def __reduce__(self) -> tuple[object, ...]:
        return RowReject, (self.reason, self.message)
