"""Prompts and training images: groups of near-duplicates, reach, components, and what to drop."""

from __future__ import annotations

import io
import itertools
from typing import Any

import networkx
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance

from memscan.census.correspondence import component_table, edge_table, removal_list, with_groups
from memscan.census.duplicates import group_duplicates, members, thumbnail
from memscan.config import VerdictConfig
from memscan.planted.renderer import Scene, random_background, random_object, render
from memscan.records import FLAGGED, REMOVAL

RULE = VerdictConfig()


def flagged(*prompts: tuple[dict[str, int], int]) -> pa.Table:
    """A flagged list of prompts given as (training image -> memorised generations that match it, generations)."""
    rows = [
        dict.fromkeys(FLAGGED.names)
        | {"prompt_id": f"p{number:03}", "caption": f"caption {number}", "count": 1 + number, "label": "VM"}
        | {"severity": 2.0, "share": 1.0, "samples": samples, "foreground": 0.9, "background": 0.9, "margin": 0.1}
        | {"match_ids": list(matches), "match_counts": list(matches.values()), "match_groups": list(matches)}
        | {"match_urls": [None] * len(matches), "source": "a", "row": number, "reach": 0, "component": 0}
        | {"cluster": 0, "signals": [], "evidence_sample": 0}
        for number, (matches, samples) in enumerate(prompts)
    ]
    return pa.Table.from_pylist(rows, schema=FLAGGED)


def still_flagged(table: pa.Table, dropped: set[str]) -> set[str]:
    """The rule by hand: memorised generations left, of all generations, against the share."""
    left = set()
    for row in table.to_pylist():
        pairs = zip(row["match_groups"], row["match_counts"], strict=True)
        kept = sum(count for group, count in pairs if group not in dropped)
        if kept and kept >= RULE.min_share * row["samples"]:
            left.add(row["prompt_id"])
    return left


def test_near_duplicates_count_once() -> None:
    table = with_groups(flagged(({"a": 2, "a2": 1, "b": 1}, 4), ({"c": 4}, 4)), {"a": "a", "a2": "a"})
    assert table["reach"].to_pylist() == [2, 1]
    assert table["match_groups"].to_pylist() == [["a", "a", "b"], ["c"]]


def test_components_are_those_of_networkx(rng: np.random.Generator) -> None:
    prompts = [({f"r{int(one)}": 1 for one in rng.integers(0, 60, rng.integers(1, 4))}, 4) for _ in range(50)]
    table = with_groups(flagged(*prompts), {})
    graph = networkx.Graph()
    for row in table.to_pylist():
        graph.add_edges_from((("prompt", row["prompt_id"]), ("image", one)) for one in row["match_ids"])
    expected = {
        frozenset(name for kind, name in part if kind == "prompt") for part in networkx.connected_components(graph)
    }
    by_number: dict[int, set[str]] = {}
    for key, number in zip(table["prompt_id"].to_pylist(), table["component"].to_pylist(), strict=True):
        by_number.setdefault(number, set()).add(key)
    assert {frozenset(part) for part in by_number.values()} == expected
    sizes = [len(by_number[number]) for number in sorted(by_number)]
    assert sizes == sorted(sizes, reverse=True)
    components = component_table(table)
    assert components["prompts"].to_pylist() == sizes
    assert sum(components["rows"].to_pylist()) == sum(table["count"].to_pylist())
    edges = edge_table(table)
    assert edges.num_rows == graph.number_of_edges()
    assert sum(edges["generations"].to_pylist()) == sum(sum(row) for row in table["match_counts"].to_pylist())


def test_removal_list_by_hand() -> None:
    # b cures two prompts, a one; prompt 3 needs both c and d, as either alone leaves 2 of 4 generations.
    table = flagged(({"a": 4}, 4), ({"b": 4}, 4), ({"b": 3, "a": 1}, 4), ({"c": 2, "d": 2}, 4))
    rows = removal_list(with_groups(table, {"b": "b", "b9": "b"}), RULE, {"b": "https://b"}).to_pylist()
    assert [(row["rank"], row["reference_id"], row["cured"], row["cured_total"]) for row in rows] == [
        (1, "b", 2, 2),
        (2, "a", 1, 3),
        (3, "c", 0, 3),
        (4, "d", 1, 4),
    ]
    assert rows[0]["url"] == "https://b"
    assert [row["prompts"] for row in rows] == [2, 2, 1, 1]


def test_near_duplicates_are_dropped_together() -> None:
    table = with_groups(flagged(({"b": 2, "a": 2}, 4), ({"c": 4}, 4)), {"a": "a", "b": "a"})
    rows = removal_list(table, RULE, {}).to_pylist()
    assert [(row["rank"], row["reference_id"], row["duplicate_of"], row["copies"]) for row in rows] == [
        (1, "a", None, 2),
        (1, "b", "a", 2),
        (2, "c", None, 1),
    ]
    assert [row["cured"] for row in rows] == [1, 1, 1]


def test_removal_totals_are_what_the_rule_says(rng: np.random.Generator) -> None:
    prompts = []
    for _ in range(40):
        counts = rng.multinomial(rng.integers(2, 5), np.ones(3) / 3)
        names = rng.choice(15, 3, replace=False)
        prompts.append(({f"r{name:02}": int(n) for name, n in zip(names, counts, strict=True) if n}, 4))
    table = with_groups(flagged(*prompts), {})
    dropped: set[str] = set()
    everyone = still_flagged(table, dropped)
    rows = removal_list(table, RULE, {}).to_pylist()
    for row in rows:
        before = still_flagged(table, dropped)
        dropped.add(row["reference_id"])
        after = still_flagged(table, dropped)
        assert row["cured"] == len(before - after)
        assert row["cured_total"] == len(everyone - after)
    assert not still_flagged(table, dropped)
    assert len(rows) == len({one for matches, _ in prompts for one in matches})


def test_greedy_is_near_the_best_that_could_be_dropped(rng: np.random.Generator) -> None:
    """Covering greedily cures at least 1 - 1/e of what any choice of as many images does (Nemhauser et al. 1978)."""
    prompts = [({f"r{int(one)}": 4}, 4) for one in rng.integers(0, 8, 30)]
    table = with_groups(flagged(*prompts), {})
    rows = removal_list(table, RULE, {}).to_pylist()
    names = sorted({row["reference_id"] for row in rows})
    best = max(30 - len(still_flagged(table, set(chosen))) for chosen in itertools.combinations(names, 3))
    assert rows[2]["cured_total"] == best  # one image a prompt: greedy is exact


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_rows_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = [({f"r{int(one)}": 1 for one in rng.integers(0, 9, 3)}, 3) for _ in range(20)]
    table = flagged(*prompts)
    shuffled = table.take(pa.array(rng.permutation(20)))
    first, again = (removal_list(with_groups(one, {}), RULE, {}) for one in (table, shuffled))
    assert first.equals(again)
    assert edge_table(with_groups(table, {})).equals(edge_table(with_groups(shuffled, {})))


def test_nothing_flagged() -> None:
    empty = with_groups(FLAGGED.empty_table(), {})
    assert removal_list(empty, RULE, {}).equals(REMOVAL.empty_table())
    assert component_table(empty).num_rows == edge_table(empty).num_rows == 0


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def test_copies_are_near_duplicates_and_kin_are_not(rng: np.random.Generator) -> None:
    scenes = {}
    for number in range(12):
        thing, ground = random_object(rng), random_background(rng)
        scenes[f"s{number:02}"] = Image.fromarray(render(Scene(thing, ground))[0])
        # The same object elsewhere, and another object before the same background: other training images to FB-Mem.
        scenes[f"t{number:02}"] = Image.fromarray(render(Scene(thing, random_background(rng)))[0])
    data = {name: encoded(image) for name, image in scenes.items()}
    for name in ("s00", "s05"):
        data[f"{name}-jpeg"] = encoded(scenes[name], "JPEG", quality=60)
        data[f"{name}-bright"] = encoded(ImageEnhance.Brightness(scenes[name]).enhance(1.15))
    groups = group_duplicates({name: thumbnail(one) for name, one in data.items()})
    found = {group: ids for group, ids in members(groups).items() if len(ids) > 1}
    assert found == {name: [name, f"{name}-bright", f"{name}-jpeg"] for name in ("s00", "s05")}


def test_what_cannot_be_decoded_is_a_group_of_its_own() -> None:
    assert thumbnail(b"not an image") is None
    assert thumbnail(None) is None
    assert group_duplicates({"b": None, "a": None}) == {"a": "a", "b": "b"}
    assert group_duplicates({}) == {}
