"""Figures of a verification against counting by hand, and the page against hostile text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memscan.config import VerdictConfig
from memscan.mitigation.locality import Located, analyses
from memscan.mitigation.targets import Target, own_images
from memscan.mitigation.units import Layout, UnitSet
from memscan.mitigation.utility import cost, frechet_distance
from memscan.mitigation.verification import attack_rates, class_mix, one_to_many, repair_effect, severity_removed
from memscan.report import words
from memscan.report.locality import comparison_rows, sentences
from memscan.report.verification import render_verification, table

BEFORE = {
    "a": [("VM", "1"), ("VM", "2"), ("NM", "9")],
    "b": [("FM", "1"), ("BM", "1"), ("FM", "1")],
    "c": [("NM", "8"), ("NM", "7"), ("NM", "6")],
    "gone": [("VM", "1")] * 3,
}
AFTER = {
    "a": [("FM", "1"), ("NM", "2"), ("NM", "9")],
    "b": [("NM", "1"), ("NM", "1"), ("NM", "1")],
    "c": [("NM", "8"), ("NM", "7"), ("BM", "6")],
}
RULE = VerdictConfig()


def test_figures_are_those_of_the_prompts_that_both_scans_have() -> None:
    found = repair_effect(BEFORE, AFTER, RULE)
    assert (found["prompts"], found["not_compared"]) == (3, 1)
    before, after = found["classes"]["before"], found["classes"]["after"]
    assert {label: before[label]["count"] for label in before} == {"VM": 2, "FM": 2, "BM": 1, "NM": 4, "memorised": 5}
    assert {label: after[label]["count"] for label in after} == {"VM": 0, "FM": 1, "BM": 1, "NM": 7, "memorised": 2}
    assert all(one["low"] <= one["rate"] <= one["high"] for one in before.values())
    # Harm before 2·2 + 2·1.5 + .5 = 7.5, after 1.5 + .5 = 2.
    assert found["severity"]["removed"] == pytest.approx(1 - 2 / 7.5)
    assert found["severity"]["before"] == pytest.approx(7.5 / 9)
    assert found["severity"]["low"] <= found["severity"]["removed"] <= found["severity"]["high"]


def test_copies_of_foreign_images_stand_apart() -> None:
    """A prompt whose own image is gone, and that falls onto somebody else's: severity stays, its own is removed."""
    before = {"a": [("VM", "1"), ("VM", "2")], "b": [("FM", "3"), ("NM", "1")]}
    after = {"a": [("VM", "3"), ("NM", "1")], "b": [("FM", "3"), ("VM", "2")]}
    targets = [
        Target("a", "a caption", "VM", "c", ("1", "2")),
        Target("b", "another", "FM", "c", ("3",)),
        Target("d", "shares image 2 with a", "VM", "c", ("2", "4")),
    ]
    own = own_images(targets)
    assert own == {"a": {"1", "2", "4"}, "b": {"3"}, "d": {"1", "2", "4"}}
    found = repair_effect(before, after, RULE, own)
    assert found["severity"]["removed"] == pytest.approx(1 - (2 + 1.5 + 2) / (4 + 1.5))
    mine = found["own_images"]
    assert mine["severity"]["removed"] == pytest.approx(1 - 1.5 / 5.5)  # only b's own foreground is left
    assert mine["classes"]["before"] == found["classes"]["before"]
    assert {label: mine["classes"]["after"][label]["count"] for label in ("VM", "FM", "NM")} == {
        "VM": 0,
        "FM": 1,
        "NM": 3,
    }
    assert "own_images" not in repair_effect(before, after, RULE)


def test_nothing_to_remove_is_no_score() -> None:
    clean = {"c": BEFORE["c"]}
    assert severity_removed(clean, clean, RULE)["removed"] is None
    assert severity_removed({}, {}, RULE)["prompts"] == 0


def test_matches_of_nm_generations_do_not_count() -> None:
    found = one_to_many(BEFORE)
    assert found["prompts"] == 3  # "c" has no memorised generation
    assert found["maximum"] == 2
    assert found["more_than_one"]["count"] == 1


def test_interval_counts_prompts_not_generations() -> None:
    """Ten prompts whose generations all agree are as good as ten draws, however many generations they have."""
    few = {str(n): [("VM" if n < 5 else "NM", "1")] * 2 for n in range(10)}
    many = {prompt: one * 50 for prompt, one in few.items()}
    one, other = class_mix(few)["VM"], class_mix(many)["VM"]
    assert one["rate"] == other["rate"] == 0.5
    assert (one["low"], one["high"]) == pytest.approx((other["low"], other["high"]), abs=1e-9)


def test_attack_rates_by_kind_and_start() -> None:
    outcomes = [
        {"kind": "memorised", "image": 0, "start": "noise", "labels": ["VM", "NM"]},
        {"kind": "memorised", "image": 0, "start": "prompt", "labels": ["FM", "FM"]},
        {"kind": "control", "image": 0, "start": "noise", "labels": ["NM", "NM"]},
    ]
    found = attack_rates(outcomes)
    assert found["memorised"]["all"]["memorised"]["rate"] == 0.75
    assert found["memorised"]["all"]["FM"]["count"] == 2
    assert found["memorised"]["noise"]["memorised"]["rate"] == 0.5
    assert found["control"]["all"]["memorised"]["rate"] == 0.0
    assert "prompt" not in found["control"]


def test_cost_of_the_same_panel_is_none() -> None:
    random = np.random.default_rng(0)
    panel = random.normal(size=(6, 3, 4)).astype(np.float32)
    panel /= np.linalg.norm(panel, axis=2, keepdims=True)
    one = {"panel_PSD": panel, "alignment_PS": np.ones((6, 3)), "training_ND": random.normal(size=(20, 4))}
    found = cost(one, one)
    assert found["frechet"]["ratio"] == 1.0
    assert found["frechet"]["between"] == pytest.approx(0.0, abs=1e-6)
    assert found["frechet"]["before"] == pytest.approx(frechet_distance(panel.reshape(18, 4), one["training_ND"]))
    assert found["diversity"]["before"] == found["diversity"]["after"] > 0
    single = {**one, "panel_PSD": panel[:, :1]}
    assert cost(single, single)["diversity"] == {"before": None, "after": None}


def result(name: str, caption: str, **changes: Any) -> dict[str, Any]:
    """Content of a verify.json."""
    own = {prompt: {"1"} for prompt in BEFORE}
    panels = {panel: repair_effect(BEFORE, AFTER, RULE, own) for panel in ("flagged", "paraphrases")}
    panels["ordinary"] = repair_effect(BEFORE, AFTER, RULE)
    attack = attack_rates([{"kind": "memorised", "image": 0, "start": "noise", "labels": ["VM"]}])
    figures = {"before": 1.0, "after": 1.0, "ratio": 1.0, "between": 0.0}
    pair = {"before": 0.1, "after": None}
    return {
        "name": name,
        "method": "nemo",
        "title": "NeMo",
        "scope": "prompt",
        "units": {"off": 3, "of": 9, "share": 1 / 3, "largest": 2, "median": 1.5},
        "changed": {"weights": 5, "of": 10},
        "mitigation_seconds": None,
        "run": {"name": caption, "fingerprint": "f"},
        "models": {"before": "x", "after": "y"},
        "settings": {"attack_steps": 50},
        "prompts": panels,
        "attack": {"before": attack, "after": attack},
        "attacked": {"attacked": 1, "controls": 0},
        "utility": {"encoder": "e", "frechet": figures, "diversity": pair, "alignment": pair},
        "utility_off": {"frechet": figures, "diversity": pair, "alignment": pair},
        "seconds": {"before": {"scan": 1.0, "examination": 2.0}, "after": {"scan": 3.0, "examination": 4.0}},
        "notes": [caption],
        "captions": [caption],
        "pictured": {"before": ["VM"], "after": [None]},
        **changes,
    }


def located(shift: float) -> Located:
    torch.manual_seed(int(10 * shift))
    units = UnitSet.of([("a", 0), ("a", 1 + int(shift) % 2)])
    return Located(torch.randn(2, 3) + shift, torch.rand(3), units, {"w": torch.tensor([1, 2])})


def locality(caption: str) -> dict[str, Any]:
    """Content of a locality.json: two images, whose second has one embedding only."""
    starts = [[torch.zeros(2, 3), torch.ones(2, 3)]] * 2
    found = [[located(0.1), located(0.2)], [located(5.0)]]
    images = [
        {"caption": caption, "draws": [{"start": "prompt", "label": "VM"}, {"start": "noise", "label": "NM"}]}
    ] * 2
    return {
        "run": {"name": caption, "fingerprint": "f"},
        "model": "x",
        "settings": {"attack_steps": 50},
        "images": images,
        "searches": 4,
        "found": 3,
        **analyses(starts, found, Layout(("a",), (3,))),
    }


def test_page_escapes_and_shows_every_repair() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    pictures = np.full((1, 8, 8, 3), 128, np.uint8)
    results = [result(hostile, hostile, method=None), result("nemo", hostile)]
    shown = {"nemo": pictures, hostile: pictures}
    page = render_verification(results, pictures, shown, [pictures[0]], locality(hostile))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/jpeg;base64,") == 4  # training image, original, two repairs
    assert render_verification(results, pictures, shown, [None]).count("cannot be read") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert page.index('id="r1"><bdi>nemo') < page.index('id="r2"')  # known methods first
    assert "Nothing verified yet" in render_verification([], pictures, {})
    alone = render_verification([], pictures[:0], {}, locality=locality("x"))
    assert "Is it in one place?" in alone
    assert "All repairs" not in alone


def test_table_has_foreground_by_itself_and_intervals() -> None:
    groups = {group["title"]: group["rows"] for group in table([result("nemo", "x"), result("other", "x", units=None)])}
    flagged = {row["name"]: row["cells"] for row in groups["Flagged prompts, scanned again"]}
    classes = repair_effect(BEFORE, AFTER, RULE)["classes"]
    for when, cell in zip(("before", "after"), flagged["FM"], strict=False):
        one = classes[when]["FM"]
        assert cell == (words.percent(one["rate"]), words.interval(one["low"], one["high"]))
    assert len(flagged["FM"]) == 3
    assert flagged["Severity removed"][0][0] == "\u2013"
    # Harm by image "1" alone: before 2 + 2·1.5 + .5, after 1.5.
    assert flagged["by own images"][1][0] == words.percent(1 - 1.5 / 5.5)
    assert "median" in flagged["Several images"][0][1]
    cost_rows = {row["name"]: row["cells"] for row in groups["Cost"]}
    assert cost_rows["Units off"][1:] == [("up to 2", "of 9 a prompt, median 1.5; 3 in all"), ("\u2013", "")]
    assert cost_rows["Weights changed"][1] == ("5", "50.0%")
    assert cost_rows["Examined in"][:2] == [("3 s", ""), ("7 s", "")]
    attacks = {row["name"]: row["cells"] for row in groups["Attack: 50 steps of embedding search"]}
    assert attacks["Control"] == [("n/a", "")] * 3


def test_locality_in_words() -> None:
    document = locality("x")
    told = sentences(document)
    assert told[0].startswith("3 of 4 searches on 2 memorised images")
    assert "prompt 2 of 2, noise 0 of 2" in told[0]
    assert len(told) == 5
    rows = {row["name"]: row for row in comparison_rows(document)}
    within, between, difference = rows["Weights chosen by Wanda"]["cells"]
    assert within == ("1.000", "1.000 to 1.000; 1 pair")
    assert between[0] == "1.000"
    assert difference == ("0.000", "")
    assert "a" in rows["Activations"]["note"]
