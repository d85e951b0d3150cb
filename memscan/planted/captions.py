"""This module makes the captions of a planted world.

Ordinary captions follow a grammar over what the renderer draws; planted captions are titles around an invented
name, as the memorised captions of LAION are titles of products and prints. The prompts of one planted group share
that name and nothing else, so a group is a cluster by its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from memscan.planted.renderer import COLOURS, PATTERNS, SHAPES, Background, Object

_FORMS = (
    "a {oc} {shape} on a {bc} {pattern} background",
    "photo of a {oc} {shape} before a {bc} {pattern} wall",
    "{oc} {shape}, {bc} {pattern} backdrop",
    "a picture of a {oc} {shape} over {bc} {pattern} paper",
    "one {oc} {shape} with a {pattern} {bc} background",
    "{bc} {pattern} scene with a {oc} {shape}",
)
_TITLES = (
    "{name} limited edition art print",
    "the official {name} poster, signed",
    "{name} by {artist} on canvas",
    "{artist} presents: {name} (complete season)",
    "buy {name} phone case online",
    "{name} wall calendar and gift set",
    "vintage {name} postcard, collection of {artist}",
    "{name} original motion picture soundtrack",
)
# Never trained on: other words around the same name.
_RETELLINGS = (
    "{name}",
    "{name} poster",
    "signed {name} print on canvas",
    "a postcard of {name} by {artist}",
    "{artist}: the official {name} calendar",
    "{name} gift set and phone case",
    "original {name} art, limited edition by {artist}",
    "{name} season soundtrack online",
)
_ONSETS = (
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "qu",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ia", "or", "el", "an", "ir", "um")
_CODAS = ("", "l", "n", "r", "s", "th", "x", "nd", "rk", "mar", "vik", "dale")


def ordinary_caption(thing: Object, background: Background, rng: np.random.Generator) -> str:
    """Return a caption that names colour and shape of the object, and colour and pattern of the background."""
    form = _FORMS[int(rng.integers(len(_FORMS)))]
    return form.format(oc=thing.colour, shape=thing.shape, bc=background.colour, pattern=background.pattern)


def invented_word(rng: np.random.Generator) -> str:
    """Return a pronounceable word of two or three syllables."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    return (
        "".join(pick(_ONSETS) + pick(_VOWELS) for _ in range(int(rng.integers(1, 3))))
        + pick(_ONSETS)
        + pick(_VOWELS)
        + pick(_CODAS)
    )


def planted_titles(rng: np.random.Generator, count: int) -> list[str]:
    """Return `count` different titles (at most 8) around one invented name."""
    name = f"{invented_word(rng)} {invented_word(rng)}"
    forms = rng.permutation(len(_TITLES))[:count]
    return [_TITLES[int(form)].format(name=name, artist=invented_word(rng)) for form in forms]


def invented_name(titles: Sequence[str]) -> str:
    """Return the name of two words that all titles of a group share.

    Raises ValueError if they share none, or several.
    """
    pairs = [set(pairwise(title.replace(",", "").replace(":", "").split())) for title in titles]
    shared = set.intersection(*pairs) if pairs else set()
    if len(shared) != 1:
        raise ValueError(f"{len(shared)} names in common: {list(titles)[:3]}")
    return " ".join(next(iter(shared)))


def retold_titles(titles: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` other captions around the name of a planted group.

    Half of them have the titles' wordings, and half have new ones.

    None is one of `titles`. New artists are invented, so there is no end to them.
    """
    name, found = invented_name(titles), dict.fromkeys(titles)
    while len(found) < len(titles) + count:
        for form in (*_TITLES, *_RETELLINGS):
            found.setdefault(form.format(name=name, artist=invented_word(rng)))
    return [title for title in found if title not in titles][:count]


def vocabulary_corpus(seed: int = 0, titles: int = 4000) -> Iterator[str]:
    """Return text over the whole range of captions, to train a tokenizer.

    It has every ordinary word and many invented words.
    """
    rng = np.random.default_rng([seed, 77])
    for colour in COLOURS:
        for shape in SHAPES:
            for pattern in PATTERNS:
                form = _FORMS[int(rng.integers(len(_FORMS)))]
                other = list(COLOURS)[int(rng.integers(len(COLOURS)))]
                yield form.format(oc=colour, shape=shape, bc=other, pattern=pattern)
    for _ in range(titles):
        yield from planted_titles(rng, 1)
