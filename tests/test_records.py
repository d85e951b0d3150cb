from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.records import (
    CENSUS,
    GENERATION,
    PROMPTS,
    Label,
    alike,
    long_id,
    prompt_digests,
    prompt_id,
    sample_seed,
    short_id,
)


def test_ids_are_those_of_earlier_runs() -> None:
    """Golden values: a change would orphan every run folder and every published seed."""
    assert prompt_id("a red cat") == "ca9dba9327a8d7d5" + "0c7629d11a3c7605"
    for name in (prompt_id("a red cat"), short_id(prompt_id("a red cat"))):
        assert sample_seed(name, 0) == 46311231529450340
        assert sample_seed(name, 1, base=3) == 6386738997766372333


@given(st.lists(st.text(), max_size=5))
def test_ids_are_those_of_the_hash_functions(captions: list[str]) -> None:
    data = [caption.encode("utf-8", "replace") for caption in captions]
    wanted = b"".join(blake2b(one, digest_size=8).digest() + blake2b(one).digest()[:8] for one in data)
    assert prompt_digests(data) == wanted


def test_ids_of_runs_of_two_ages_are_compared_by_what_both_have() -> None:
    old, new = {"ca9dba9327a8d7d5": 1}, {prompt_id("a red cat"): 2}
    assert long_id(*old, "a red cat") == prompt_id("a red cat")
    assert long_id("p-1", "a red cat") == "p-1"
    for sides in ((old, new), (new, old), (old, old)):
        same = alike(*sides)
        assert {same(one) for side in sides for one in side} == set(old)
    same = alike(new, new, {})
    assert list(map(same, new)) == list(new)


@given(st.text(), st.integers(0, 10_000), st.integers(0, 2**31))
def test_seeds_fit_torch(caption: str, sample: int, base: int) -> None:
    seed = sample_seed(prompt_id(caption.encode("utf-8", "replace").decode()), sample, base)
    assert 0 <= seed < 2**63


def test_seeds_differ_by_prompt_sample_and_base() -> None:
    seeds = {sample_seed(p, s, b) for p in ("a", "b") for s in range(4) for b in range(2)}
    assert len(seeds) == 16


def test_labels_stand_most_severe_first() -> None:
    assert [str(label) for label in Label] == ["VM", "FM", "BM", "NM"]


def test_a_census_row_is_a_prompt_row_with_generations() -> None:
    assert CENSUS.names[: len(PROMPTS.names) + 1] == [*PROMPTS.names, "generations"]
    assert CENSUS.field("generations").type.value_type == GENERATION


@pytest.mark.parametrize("name", ["prompt_id", "caption", "count", "source", "row", "status"])
def test_what_accounts_for_a_row_is_never_null(name: str) -> None:
    assert not PROMPTS.field(name).nullable
