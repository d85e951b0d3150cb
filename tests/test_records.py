from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.records import CENSUS, GENERATION, PROMPTS, Label, prompt_id, sample_seed


def test_ids_are_those_of_earlier_runs() -> None:
    """Golden values: a change would orphan every run folder and every published seed."""
    assert prompt_id("a red cat") == "ca9dba9327a8d7d5"
    assert sample_seed("ca9dba9327a8d7d5", 0) == 46311231529450340
    assert sample_seed("ca9dba9327a8d7d5", 1, base=3) == 6386738997766372333


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
