"""People's verdicts beside the machine's: counts that add up, precision with its interval, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.census.rates import rate
from memscan.census.review import VERDICTS, Judgement, read_reviews, summarise_review
from memscan.errors import InputError
from memscan.records import MEMORISED


def write(path: Path, verdicts: list[dict[str, Any]], **changes: Any) -> str:
    document = {"format": "memscan-review/1", "run": "r1", "reviewer": "Ada", "saved": "x", "verdicts": verdicts}
    path.write_text(json.dumps({**document, **changes}))
    return str(path)


def entry(prompt: str, verdict: str | None, when: str = "2026-11-30T10", **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt, "verdict": verdict, "note": "", "when": when, **more}


def test_a_review_beside_the_machine(tmp_path: Path) -> None:
    verdicts = [
        entry("a", "confirmed", note="same face"),
        entry("b", "dismissed"),
        entry("c", "unsure"),
        entry("d", None),
    ]
    found = read_reviews([write(tmp_path / "review.json", [*verdicts, entry("gone", "confirmed")])], "r1")
    labels = {"a": "VM", "b": "VM", "c": "FM", "d": "BM", "e": "BM"}
    summary = summarise_review(found, labels)
    assert [summary[key] for key in ("reviewed", "confirmed", "dismissed", "unsure", "not_flagged")] == [3, 1, 1, 1, 1]
    assert summary["precision"] == rate(1, 2).as_dict()
    assert summary["classes"]["VM"]["flagged"] == 2
    assert summary["classes"]["BM"] | {"precision": None} == {
        "flagged": 2, "reviewed": 0, "confirmed": 0, "dismissed": 0, "unsure": 0, "precision": None,
    }  # fmt: skip
    assert summary["classes"]["BM"]["precision"]["rate"] is None
    assert summary["reviewers"] == ["Ada"]
    assert summary["verdicts"][0]["notes"] == ["same face"]


def test_a_later_verdict_replaces_an_earlier_one_and_two_reviewers_may_disagree(tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", [entry("a", "dismissed", "2026-11-30T09"), entry("b", "confirmed")])
    later = write(tmp_path / "2.json", [entry("a", "confirmed", "2026-11-30T11")])
    other = write(tmp_path / "3.json", [entry("b", "dismissed")], reviewer="Bo")
    found = read_reviews([later, first, other], "r1")
    assert (found["a"].verdict, found["a"].agreed) == ("confirmed", True)
    assert (found["b"].verdict, found["b"].agreed, found["b"].reviewers) == ("unsure", False, ("Ada", "Bo"))
    assert summarise_review(found, {"a": "VM", "b": "FM"})["disagreements"] == 1


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(VERDICTS)))
def test_counts_conserve(given_verdicts: dict[str, Any]) -> None:
    judgements = {key: Judgement(key, verdict, ("x",), (), "") for key, verdict in given_verdicts.items()}
    labels = dict(zip("abcde", ["VM", "FM", "BM", "VM", "FM"], strict=True))
    summary = summarise_review(judgements, labels)
    assert summary["reviewed"] + summary["not_flagged"] == len(judgements)
    assert summary["reviewed"] == sum(summary[name] for name in VERDICTS)
    for name in ("reviewed", *VERDICTS):
        assert summary[name] == sum(summary["classes"][label][name] for label in MEMORISED)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSON"),
        ("[]", "no review"),
        ('{"format": "other", "run": "r1", "verdicts": []}', "no review"),
        ('{"format": "memscan-review/1", "run": "r2", "verdicts": []}', "run r2"),
        (
            '{"format": "memscan-review/1", "run": "r1", "verdicts": [{"prompt_id": "a", "verdict": "maybe"}]}',
            "verdict",
        ),
    ],
)
def test_a_file_that_is_no_review_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "review.json").write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        read_reviews([str(tmp_path / "review.json")], "r1")
    assert len(str(caught.value).splitlines()) == 1
