"""This module computes the canonical form of a caption, which is what a person would see.

HTML entities are unescaped, Unicode is in its composed form, and runs of white space and control characters are one
space. Captions that are equal then are one prompt.
"""

from __future__ import annotations

import html
import html.entities
import re
import unicodedata

# Control characters (Unicode category Cc) and a byte order mark that was pasted into the middle of a file.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufeff]")

# A name without its semicolon is an entity only where neither a letter, a digit nor "=" follows: HTML's rule for
# attributes, from which captions come. Else "R&Bands" or "?a=1&copy=2" would be mangled.
_BARE_NAMES = "|".join(sorted((n for n in html.entities.html5 if not n.endswith(";")), key=len, reverse=True))
_ENTITY = re.compile(
    rf"&(?:#[0-9]+(?:;|(?![0-9]))|#[xX][0-9a-fA-F]+(?:;|(?![0-9a-fA-F]))|[A-Za-z][A-Za-z0-9]*;|(?:{_BARE_NAMES})(?![A-Za-z0-9=]))"
)
# "&amp;amp;amp;lt;" is folded at once: level by level it would take time quadratic in its length.
_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP)(?:;|(?![A-Za-z0-9=]))|#0*38(?:;|(?![0-9]))|#[xX]0*26(?:;|(?![0-9a-fA-F])))+")
_MOST_DIGITS = 7  # of the largest code point, 1114111 or 10ffff


def normalise(text: str) -> str:
    """Return the canonical form of a caption; applying it again changes nothing.

    HTML entities are unescaped, even if they were escaped several times, Unicode is brought to NFC, control characters
    and runs of white space become one space, and the ends are stripped.
    """
    # Most captions beyond ASCII need nothing more. Of white space, only the plain space is printable.
    if "&" not in text and text.isprintable() and "  " not in text and unicodedata.is_normalized("NFC", text):
        return text.strip(" ")
    while True:
        before = text
        if "&" in text:
            text = _ENTITY.sub(_unescape, _AMPERSANDS.sub("&", text))
        text = text if text.isascii() else unicodedata.normalize("NFC", text)
        # What is printable holds no control character.
        text = " ".join((text if text.isprintable() else _CONTROL.sub(" ", text)).split())
        if text == before or "&" not in text:
            return text


def _unescape(match: re.Match[str]) -> str:
    entity = match.group()
    if entity[1] != "#":
        # html.unescape would take "&notit;" for "&not" followed by "it;"
        return html.unescape(entity) if entity[1:] in html.entities.html5 else entity
    hexadecimal = entity[2] in "xX"
    digits = entity[3 if hexadecimal else 2 :].rstrip(";").lstrip("0") or "0"
    if len(digits) > _MOST_DIGITS:
        return "\ufffd"  # html.unescape's answer to a number that is no character; it fails on thousands of digits
    return html.unescape(f"&#{'x' if hexadecimal else ''}{digits};")
