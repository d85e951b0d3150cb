"""A repair held to limits: what fails, what passes, what is not known, and in which words the page begins."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscan.errors import ConfigError
from memscan.mitigation.policy import RepairPolicy, judge, load_policy
from memscan.report.holds import headline, verdict
from memscan.report.verification import render_verification
from tests.mitigation.test_verification import result


def repaired(
    removed: float | None = 0.95,
    paraphrases: float = 0.05,
    attack: float = 0.05,
    control: float | None = None,
    ratio: float | None = 1.0,
    alignment: tuple[float | None, float | None] = (0.1, 0.1),
    name: str = "nemo",
) -> dict[str, Any]:
    """A verification with these figures; intervals reach .04 to either side."""
    one = copy.deepcopy(result(name, "a red fox"))
    bounds = {"low": None, "high": None} if removed is None else {"low": removed - 0.04, "high": removed + 0.04}
    one["prompts"]["flagged"]["severity"] |= {"removed": removed, **bounds}
    one["prompts"]["paraphrases"]["classes"]["after"]["memorised"] |= {"rate": paraphrases, "high": paraphrases + 0.04}
    found = {"all": {"memorised": {"rate": attack, "low": max(0.0, attack - 0.04), "high": attack + 0.04}}}
    beside = (
        {}
        if control is None
        else {"control": {"all": {"memorised": {"rate": control, "low": control, "high": control}}}}
    )
    mixed = one["attack"]["after"]["memorised"]["all"]
    one["attack"]["after"] = {"memorised": {"all": mixed | found["all"]}, **beside}
    one["utility"]["frechet"]["ratio"] = ratio
    one["utility"]["alignment"] = dict(zip(("before", "after"), alignment, strict=True))
    return one


@pytest.mark.parametrize(
    ("changes", "policy", "broken"),
    [
        ({}, {}, set()),
        ({"removed": 0.9}, {}, set()),  # a limit itself is kept
        ({"removed": 0.89}, {}, {"min_severity_removed"}),
        ({"removed": 0.92}, {"judge": "bound"}, {"min_severity_removed"}),
        ({"paraphrases": 0.2}, {}, {"max_paraphrases_memorised"}),
        ({"attack": 0.3}, {}, {"max_attack_success"}),
        ({"attack": 0.3, "control": 0.25}, {}, set()),  # no more than on images that nobody memorised
        ({"attack": 0.08, "control": 0.0}, {"judge": "bound"}, {"max_attack_success"}),
        ({"ratio": 1.2, "alignment": (0.1, 0.08)}, {}, {"max_frechet_ratio", "min_alignment_ratio"}),
        ({"ratio": 1.2}, {"max_frechet_ratio": None}, set()),
    ],
)
def test_what_breaks_a_limit(changes: dict[str, Any], policy: dict[str, Any], broken: set[str]) -> None:
    found = judge(repaired(**changes), RepairPolicy(**policy))
    assert {rule.rule for rule in found.rules if rule.state == "failed"} == broken
    assert found.state == ("failed" if broken else "passed")


@pytest.mark.parametrize("changes", [{"removed": None}, {"ratio": None}, {"alignment": (None, None)}])
def test_what_was_not_measured_is_no_pass(changes: dict[str, Any]) -> None:
    found = judge(repaired(**changes), RepairPolicy())
    assert found.state == "unknown"
    assert "is not decided: " in verdict(found)
    assert judge(repaired(**changes, attack=1.0), RepairPolicy()).state == "failed"  # what is known counts


def test_the_page_begins_with_the_answer() -> None:
    good, bad = repaired(name="finetune"), repaired(removed=0.733, attack=1.0)
    judged = [judge(one, RepairPolicy()) for one in (bad, good)]
    assert headline(judged[:1]) == "nemo FAILED: 73.3% of the severity removed, at least 90%"
    assert headline(judged[1:]).startswith("finetune holds")
    assert headline(judged) == "1 of 2 repairs holds: finetune"
    assert headline([judged[0], judged[0]]) == "None of 2 repairs holds"
    pictures = np.full((1, 8, 8, 3), 128, np.uint8)
    page = render_verification([bad], pictures, {"nemo": pictures})
    main = page[page.index("<main") :]
    assert main.index("nemo FAILED: 73.3%") < main.index("All repairs")
    assert "defaults, which nobody has chosen" in page
    own = render_verification([bad], pictures, {"nemo": pictures}, policy=RepairPolicy(min_severity_removed=0.5))
    assert "defaults, which nobody has chosen" not in own
    assert "73.3% of the severity removed, at least 50%" in own


def test_a_policy_file(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text("min_severity_removed: 0.5\nmax_attack_success: null\n")
    policy = load_policy(str(path))
    assert (policy.min_severity_removed, policy.max_attack_success, policy.max_frechet_ratio) == (0.5, None, 1.1)
    path.write_text("min_severity: 0.5\njudge: strict\n")
    with pytest.raises(ConfigError, match=r"2 mistakes: .*min_severity_removed.*\(line 1\)"):
        load_policy(str(path))
