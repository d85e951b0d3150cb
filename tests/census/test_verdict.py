"""The verdict rule by truth tables, and the batch form against it row by row."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from memscan.census.summary import one_to_many, summarise
from memscan.census.tally import Tally, join_flagged, judge_rows, with_urls
from memscan.census.verdict import verdict
from memscan.config import MetricConfig, VerdictConfig
from memscan.errors import Reason, RunError
from memscan.metric.decision import margin_of
from memscan.records import FLAGGED, Label

RULE, METRIC = VerdictConfig(), MetricConfig(variant="paper")


def generations(kit: Any, labels: str, **options: Any) -> list[dict[str, Any]]:
    prompt = kit.Planted("a caption", labels, **options)
    return [kit.generation(prompt, sample, label, False) for sample, label in enumerate(labels.split())]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("NM", "NM"),
        ("VM", "VM"),
        ("VM NM", "VM"),  # exactly half
        ("VM NM NM", "NM"),  # a third
        ("FM FM VM NM", "FM"),  # the most frequent, not the most severe
        ("FM VM NM NM", "VM"),  # tie: the more severe
        ("BM FM NM NM", "FM"),
        ("BM VM", "VM"),
        ("BM FM VM", "VM"),
        ("BM BM FM FM NM", "FM"),
        ("BM BM FM VM", "BM"),
        ("NM NM NM NM", "NM"),
    ],
)
def test_label_of_a_prompt(kit: Any, labels: str, expected: str) -> None:
    for order in set(itertools.permutations(labels.split())):
        assert verdict(generations(kit, " ".join(order)), RULE, METRIC).label.value == expected


@pytest.mark.parametrize(
    ("share", "memorised", "samples", "flagged"),
    [
        (0.3, 3, 10, True),
        (0.3, 2, 10, False),
        (0.1, 1, 10, True),
        (1.0, 9, 10, False),
        (1.0, 10, 10, True),
        (1 / 3, 1, 3, True),
        (1e-12, 0, 5, False),  # a tiny share still asks for one
        (1e-12, 1, 5, True),
        (0.7, 7, 10, True),
    ],
)
def test_share_that_flags(kit: Any, share: float, memorised: int, samples: int, flagged: bool) -> None:
    labels = " ".join(["FM"] * memorised + ["NM"] * (samples - memorised))
    rule = VerdictConfig(min_share=share)
    assert verdict(generations(kit, labels), rule, METRIC).flagged is flagged
    table = kit.census_table([kit.Planted("a caption", labels)], evidence=False)
    assert judge_rows(table, rule, METRIC).flagged.num_rows == int(flagged)


@pytest.mark.parametrize(
    ("label", "foreground", "background", "expected"),
    [
        ("VM", 0.95, 0.82, 0.02),
        ("VM", 0.81, 0.99, 0.01),
        ("FM", 0.9, 0.1, 0.1),
        ("BM", 0.1, 0.85, 0.05),
        ("NM", 0.7, 0.5, -0.1),
    ],
)
def test_margin(label: str, foreground: float, background: float, expected: float) -> None:
    assert margin_of(Label(label), foreground, background, METRIC) == pytest.approx(expected)


def test_margin_has_two_thresholds() -> None:
    metric = MetricConfig(foreground_threshold=0.6, background_threshold=0.9)
    assert margin_of(Label.VM, 0.95, 0.95, metric) == pytest.approx(0.05)
    assert margin_of(Label.FM, 0.95, 0.5, metric) == pytest.approx(0.35)


def test_best_evidence_is_of_the_prompts_label(kit: Any) -> None:
    # The VM generation has the largest margin of all, but the prompt is FM.
    rows = generations(kit, "FM VM FM NM", scores=((0.85, 0.1), (0.99, 0.99), (0.9, 0.2), (0.1, 0.1)))
    found = verdict(rows, RULE, METRIC)
    assert (found.label, found.best) == (Label.FM, 2)
    assert found.margin == pytest.approx(0.1)


def test_best_evidence_ties_go_to_the_first_sample(kit: Any) -> None:
    rows = generations(kit, "VM VM VM")
    assert verdict(rows, RULE, METRIC).best == 0
    assert verdict(rows[::-1], RULE, METRIC).best == 2  # sample 0 again


def test_matches_of_memorised_generations_only(kit: Any) -> None:
    rows = generations(kit, "FM NM FM FM NM", matches=("b", "x", "a", "b", "x"))
    assert verdict(rows, RULE, METRIC).match_ids == ("b", "a")


def test_equally_frequent_matches_begin_with_the_best_evidence(kit: Any) -> None:
    rows = generations(kit, "FM FM FM", matches=("c", "b", "a"), scores=((0.85, 0.1), (0.95, 0.1), (0.9, 0.1)))
    assert verdict(rows, RULE, METRIC).match_ids == ("b", "a", "c")


def test_severity_is_over_all_generations(kit: Any) -> None:
    assert verdict(generations(kit, "VM FM BM NM"), RULE, METRIC).severity == pytest.approx((2 + 1.5 + 0.5) / 4)
    rule = VerdictConfig(harm={"VM": 10.0})  # the others keep the published values
    assert verdict(generations(kit, "VM FM BM NM"), rule, METRIC).severity == pytest.approx((10 + 1.5 + 0.5) / 4)


def test_noise_norm_is_the_mean_of_what_is_there(kit: Any) -> None:
    rows = generations(kit, "NM NM NM")
    for row, norm in zip(rows, (2.0, None, 4.0), strict=True):
        row["noise_norm"] = norm
    assert verdict(rows, RULE, METRIC).noise_norm == pytest.approx(3.0)
    assert verdict(generations(kit, "NM", noise_norm=None), RULE, METRIC).noise_norm is None


def test_a_verdict_needs_generations_and_known_labels(kit: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        verdict([], RULE, METRIC)
    with pytest.raises(ValueError, match="XX"):
        verdict([*generations(kit, "VM"), {"label": "XX"}], RULE, METRIC)


def random_prompts(kit: Any, count: int, seed: int) -> list[Any]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        labels = " ".join(rng.choice(["VM", "FM", "BM", "NM", "NM"]) for _ in range(rng.randint(1, 6)))
        scores = tuple((rng.random(), rng.random()) for _ in labels.split())
        matches = [f"ref-{rng.randrange(5)}" for _ in range(rng.randint(1, 3))]
        reason = Reason.GENERATION_FAILED if rng.random() < 0.1 else None
        found.append(kit.Planted(f"caption {number}", labels, matches, rng.randint(1, 4), reason, scores))
    return found


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_batch_is_judged_as_its_rows(kit: Any, share: float) -> None:
    rule = VerdictConfig(min_share=share)
    prompts = random_prompts(kit, 300, seed=3)
    table = kit.census_table(prompts, evidence=False)
    found = judge_rows(table, rule, METRIC)
    rows = [row for row in table.to_pylist() if row["status"] == "done"]
    verdicts = {row["prompt_id"]: verdict(row["generations"], rule, METRIC) for row in rows}
    expected = {id_: one for id_, one in verdicts.items() if one.flagged}
    flagged = {row["prompt_id"]: row for row in found.flagged.to_pylist()}
    assert flagged.keys() == expected.keys()
    for id_, one in expected.items():
        row = flagged[id_]
        assert (row["label"], row["match_ids"], row["samples"]) == (one.label.value, list(one.match_ids), one.samples)
        assert row["margin"] == pytest.approx(one.margin, abs=1e-6)
    labels = [one.label.value for one in verdicts.values()]
    assert {label: labels.count(label) for label in ("VM", "FM", "BM", "NM")} == dict(found.tally.prompt_labels)
    assert found.tally.row_labels.total() == sum(row["count"] for row in rows)


def test_counts_conserve_and_batches_add_up(kit: Any) -> None:
    prompts = random_prompts(kit, 120, seed=11)
    table = kit.census_table(prompts, evidence=False)
    whole = judge_rows(table, RULE, METRIC)
    pieces = [judge_rows(table.slice(start, 17), RULE, METRIC) for start in range(0, 120, 17)]
    random.Random(0).shuffle(pieces)
    joined = sum((piece.tally for piece in pieces), Tally())
    assert joined == whole.tally
    assert joined.prompts == joined.done + joined.rejected.total() == 120
    assert joined.rows == joined.done_rows + joined.rejected_rows.total() == sum(prompt.count for prompt in prompts)
    assert joined.generations == sum(len(p.labels.split()) for p in prompts if not p.reason)
    assert join_flagged([piece.flagged for piece in pieces]).equals(join_flagged([whole.flagged]))


def test_flagged_rows_fit_the_schema_and_stand_worst_first(kit: Any) -> None:
    table = join_flagged(
        [judge_rows(kit.census_table(random_prompts(kit, 100, 5), evidence=False), RULE, METRIC).flagged]
    )
    assert table.schema.equals(FLAGGED)
    severities = table["severity"].to_numpy()
    assert np.all(np.diff(severities) <= 0)
    assert join_flagged([]).schema.equals(FLAGGED)


def counts(mix: dict[str, Any]) -> dict[str, int]:
    return {label: entry["count"] for label, entry in mix["classes"].items()}


def test_summary(kit: Any, small_census: list[Any]) -> None:
    found = judge_rows(kit.census_table(small_census, evidence=False), RULE, METRIC)
    summary = summarise(found.tally, found.flagged, RULE)
    assert summary["counts"] == {
        "rows_in": 21,
        "distinct_prompts": 14,
        "done": 12,
        "rejected": 2,
        "rejected_by_reason": {"caption_empty": 1, "generation_not_finite": 1},
        "rejected_rows_by_reason": {"caption_empty": 5, "generation_not_finite": 1},
        "generations": 48,
        "flagged": 3,
    }
    assert counts(summary["prompts"]) == {"VM": 1, "FM": 1, "BM": 1, "NM": 9}
    assert summary["prompts"]["memorised"]["rate"] == 3 / 12
    assert counts(summary["generations"]) == {"VM": 3 + 1, "FM": 2, "BM": 4, "NM": 38}
    assert summary["rows"]["memorised"] == {"count": 5, "total": 15, "rate": 5 / 15}
    assert summary["severity"]["total"] == pytest.approx(4 * 2 + 2 * 1.5 + 4 * 0.5)
    assert summary["one_to_many"]["histogram"] == {"1": 1, "2": 1, "3": 1}


def test_one_to_many(kit: Any) -> None:
    prompts = [
        kit.Planted("one", "VM VM VM VM", ("a",)),
        kit.Planted("two", "VM NM VM VM", ("a", "x", "b", "b")),
        kit.Planted("four", "VM VM VM VM", ("a", "b", "c", "d")),
        kit.Planted("none", "NM NM NM NM", ("a", "b", "c", "d")),
    ]
    reach = one_to_many(judge_rows(kit.census_table(prompts, evidence=False), RULE, METRIC).flagged)
    assert reach["more_than_one"]["count"] == 2
    assert (reach["median"], reach["maximum"], reach["mean"]) == (2.0, 4, pytest.approx(7 / 3))
    assert (reach["flagged"], reach["training_images_reached"]) == (3, 4)


def test_nothing_flagged(kit: Any) -> None:
    found = judge_rows(kit.census_table([kit.Planted("plain")], evidence=False), RULE, METRIC)
    summary = summarise(found.tally, found.flagged, RULE)
    assert summary["one_to_many"]["median"] is None
    assert summary["prompts"]["memorised"]["rate"] == 0
    assert summary["severity"]["mean_flagged_prompt"] is None


def test_urls_stand_beside_their_ids(kit: Any) -> None:
    found = judge_rows(kit.census_table([kit.Planted("p", "VM VM", ("a", "b"))], evidence=False), RULE, METRIC)
    filled = with_urls(found.flagged, {"b": "https://example.org/b"})
    assert filled["match_urls"].to_pylist() == [[None, "https://example.org/b"]]
    assert filled.schema.equals(FLAGGED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "lost"}, "neither done nor rejected"),
        ({"generations": []}, "done without a generation"),
        ({"generations": "label"}, "none of VM, FM, BM, NM"),
    ],
)
def test_rows_that_would_bias_a_rate_are_refused(kit: Any, change: dict[str, Any], message: str) -> None:
    table = kit.census_table([kit.Planted("fine"), kit.Planted("broken")], evidence=False)
    rows = table.to_pylist()
    if change.get("generations") == "label":
        rows[1]["generations"][2]["label"] = "??"
    else:
        rows[1].update(change)
    with pytest.raises(RunError, match=message) as caught:
        judge_rows(pa.Table.from_pylist(rows, schema=table.schema), RULE, METRIC)
    assert rows[1]["prompt_id"] in str(caught.value)
