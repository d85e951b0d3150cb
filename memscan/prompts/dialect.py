"""This module finds out how a file of separated values is to be read.

It has a strict reader of its records that takes linear time.

A field that begins with a quote ends with one, and a separator or the end of the line follows; inside, a quote is
doubled or stands behind a backslash, as the dialect says. A quote anywhere else is an ordinary character. If a record
cannot be parsed, only its first line is rejected, with its number, and reading continues with the next line.

The time is linear, because the scan that an opening quote causes ends at the next quote that is not escaped, and every
line from which another such scan could begin holds such a quote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Quoting = Literal["doubled", "backslash", "none"]
NO_SEPARATOR = b"\x1f"
MAX_RECORD = 1 << 20  # bytes of one record: past it, an opening quote is taken as never closed
_INSIDE = {
    "doubled": re.compile(rb'[^"]*+(?:""[^"]*+)*+', re.DOTALL),
    "backslash": re.compile(rb'[^"\\]*+(?:\\(?:.|\Z)[^"\\]*+)*+', re.DOTALL),
}
_ESCAPED = re.compile(rb'\\(["\\])')
_ADDRESS = re.compile(rb"\s*[a-zA-Z][a-zA-Z0-9+.-]*://")


@dataclass(frozen=True)
class Dialect:
    """This is the separator and the quoting of a file.

    Args:
        separator: one byte; `NO_SEPARATOR` where there is one column.
        quoting: how a quote is written inside a quoted field; "none" where quotes have no meaning.
    """

    separator: bytes
    quoting: Quoting = "doubled"

    @cached_property
    def _inside(self) -> re.Pattern[bytes]:
        return _INSIDE[self.quoting]

    def plain(self, quoted: bytes) -> bytes:
        """Return the content of a quoted field."""
        if self.quoting == "doubled":
            return quoted.replace(b'""', b'"')
        return _ESCAPED.sub(rb"\1", quoted)

    def literal(self, line: bytes) -> list[bytes]:
        """Return the fields of a line in which quotes have no meaning."""
        return line.split(self.separator)


class Record(NamedTuple):
    """This is a record, or the reason why there is none: `fields` is empty then.

    Attributes:
        line: number of its first line, from 1 on.
        lines: how many lines it takes.
        quoted: fields that were quoted; `needed` of them could not have been written otherwise.
    """

    fields: list[bytes]
    line: int
    lines: int = 1
    problem: str | None = None
    quoted: int = 0
    needed: int = 0


@dataclass
class RecordReader:
    """This reads records from lines, in one dialect.

    Args:
        dialect: of the file.
        width: fields of the header; 0 where it is not known yet.
        url: place of a column of addresses, if there is one.
        sloppy: whether quotes that mean nothing have been seen, so that a quote proves little.
    """

    dialect: Dialect
    width: int = 0
    url: int | None = None
    sloppy: bool = False

    def read(
        self, lines: list[bytes], number: int, more: Callable[[], Sequence[bytes]] = lambda: ()
    ) -> Iterator[Record]:
        """Yield records of lines without their ends; blank lines are no records.

        Args:
            lines: grows by what `more` gives.
            number: of the first line.
            more: gives further lines if a record continues; none at the end of the file.
        """
        at = 0
        while at < len(lines):
            line = lines[at]
            if not line:
                at += 1
            elif self.dialect.quoting == "none" or b'"' not in line:
                yield Record(line.split(self.dialect.separator), number + at)
                at += 1
            else:
                record = self._record(lines, at, number, more)
                if record.lines > 1 and not record.problem and self._is_doubtful(lines[at : at + record.lines]):
                    what = f"{record.lines} lines that are a record each, or one whose quoted field has line breaks"
                    record = Record([], number + at, problem=f"{what}: {line[:100]!r}")
                self.sloppy = self.sloppy or bool(record.problem)
                yield record
                at += record.lines

    def _record(self, lines: list[bytes], first: int, number: int, more: Callable[[], Sequence[bytes]]) -> Record:
        separator = self.dialect.separator
        fields: list[bytes] = []
        at, place, quoted, needed = first, 0, 0, 0
        while True:
            line = lines[at]
            if line[place : place + 1] == b'"':
                quoted += 1
                content, at, place, problem = self._quoted(lines, at, place + 1, number, first, more)
                if problem:
                    return Record([], number + first, problem=problem)
                line = lines[at]
                needed += separator in content or b'"' in content or b"\n" in content
                fields.append(content)
                if place == len(line):
                    break
                place += 1
            else:
                end = line.find(separator, place)
                content = line[place:] if end < 0 else line[place:end]
                self.sloppy = self.sloppy or b'"' in content
                fields.append(content)
                if end < 0:
                    break
                place = end + 1
        return Record(fields, number + first, at - first + 1, quoted=quoted, needed=needed)

    def _quoted(
        self, lines: list[bytes], at: int, place: int, number: int, first: int, more: Callable[[], Sequence[bytes]]
    ) -> tuple[bytes, int, int, str | None]:
        """Content of a quoted field; line and place behind its closing quote; what is wrong."""
        inside, start = self.dialect._inside, lines[first][:100]
        parts: list[bytes] = []
        held, opened = 0, number + at
        while True:
            line = lines[at]
            match = inside.match(line, place)
            end = match.end() if match else place
            parts.append(line[place:end])
            held += end - place + 1
            if end < len(line):
                break
            if held > MAX_RECORD or (at + 1 >= len(lines) and not self._grow(lines, more)):
                return b"", at, end, f"a quote is opened in line {opened} and never closed: {start!r}"
            at, place = at + 1, 0
        follows = line[end + 1 : end + 2]
        if follows and follows != self.dialect.separator:
            where = f"line {number + at}" if number + at != opened else f"line {opened}"
            return b"", at, end, f"a quote in {where} is neither at the end of its field nor escaped: {start!r}"
        return self.dialect.plain(b"\n".join(parts)), at, end + 1, None

    @staticmethod
    def _grow(lines: list[bytes], more: Callable[[], Sequence[bytes]]) -> bool:
        further = more()
        lines.extend(further)
        return bool(further)

    def _is_doubtful(self, lines: list[bytes]) -> bool:
        """Return whether a record of several lines may as well be as many records, two of which a stray quote joins."""
        if self.width < 2:
            return self.sloppy
        each = [self.dialect.literal(line) for line in lines if line]
        if any(len(fields) != self.width for fields in each):
            return False
        if self.sloppy:
            return True
        return self.url is not None and all(_ADDRESS.match(fields[self.url].strip(b'"')) for fields in each)


def fits(fields: Sequence[bytes], width: int) -> bool:
    """Return whether a record has the header's fields; empty fields after them are no mistake."""
    return len(fields) == width or (len(fields) > width and not any(fields[width:]))


@dataclass
class Evidence:
    """This is what the first lines of a file show when they are read in one dialect.

    Attributes:
        right, wrong: records of the header's width; lines that are none.
        quoted, needed: quoted fields, and those that could not have been written otherwise.
        joined: records of several lines each of which would be a record of its own.
        header_quoted, whole_columns: whether the header's fields, or fields of all records, are quoted.
        sloppy: whether quotes that mean nothing were seen.
    """

    right: int = 0
    wrong: int = 0
    quoted: int = 0
    needed: int = 0
    joined: int = 0
    header_quoted: bool = False
    whole_columns: bool = False
    sloppy: bool = False

    @property
    def share(self) -> float:
        """This is the share of lines, in [0, 1], that are right."""
        return self.right / max(1, self.right + self.wrong)


_ORDER: tuple[Quoting, ...] = ("doubled", "backslash", "none")


def find_quoting(lines: list[bytes], separator: bytes, complete: bool) -> tuple[Quoting, Evidence]:
    """Return the quoting under which a file's first lines are records of one width.

    Args:
        lines: without their ends; the first that is not blank has the width of all.
        complete: whether the file ends with them.
    """
    counted = {quoting: _evidence(lines, Dialect(separator, quoting), complete) for quoting in _ORDER}
    best: Quoting = min(_ORDER, key=lambda quoting: counted[quoting].wrong)
    doubled = counted["doubled"]
    # Both fit: the quotes of a file that never needs one are characters, where tabs separate (a TSV has no quoting) and
    # only some records have them; so are those that would join lines which fit on their own.
    if best == "doubled" and counted["none"].wrong == 0 and not doubled.header_quoted and doubled.quoted:
        needless = separator == b"\t" and not doubled.needed and not doubled.whole_columns
        if needless or doubled.joined:
            best = "none"
    return best, counted[best]


def _are_records(lines: list[bytes], dialect: Dialect, width: int) -> bool:
    """Whether lines that were read as one record are likelier one each: all of the header's width, and separated by
    tabs, which captions hardly hold, or with an address in one and the same column."""
    each = [dialect.literal(line) for line in lines if line]
    if any(len(fields) != width for fields in each):
        return False
    return dialect.separator == b"\t" or any(all(map(_ADDRESS.match, column)) for column in zip(*each, strict=True))


def _evidence(lines: list[bytes], dialect: Dialect, complete: bool) -> Evidence:
    found, width, marked, reader = Evidence(), 0, 0, RecordReader(dialect)
    for record in reader.read(list(lines), 0):
        if not width:
            width = len(record.fields) or -1
            found.header_quoted = record.quoted > 0
        if record.problem and not complete and "never closed" in record.problem:
            continue  # the sample ends there, not the file
        fine = record.problem is None and fits(record.fields, width)
        found.right += fine
        # A record of several lines that does not fit counts by its lines, or a reading that joins them all would win.
        found.wrong += 0 if fine else record.lines
        found.quoted += record.quoted
        found.needed += record.needed
        if record.lines > 1:
            found.joined += _are_records(lines[record.line : record.line + record.lines], dialect, width)
        marked += record.quoted > 0
    found.whole_columns = found.right > 1 and marked >= found.right - (not found.header_quoted)
    found.sloppy = reader.sloppy
    return found
