"""This module builds the graph of prompts and the training images that they reach, and the list of images to remove.

Edges of the bipartite graph join a flagged prompt to a training image that at least one of its memorised generations
matches, weighted by how many do. Near-duplicates of one image (`duplicates`) are one node, a *group* named by its
smallest id. Connected components of the graph belong together, whatever their captions are.

The removal list answers the question: if these images had not been in the training set, which prompts would no longer
be flagged?
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memscan.census import duplicates
from memscan.census.verdict import needed
from memscan.config import VerdictConfig
from memscan.records import COMPONENTS, EDGES, FLAGGED, MEMORISED, REMOVAL


def with_groups(flagged: pa.Table, groups: Mapping[str, str]) -> pa.Table:
    """Fill the columns `match_groups`, `reach` and `component` of a flagged list (`records.FLAGGED`).

    Args:
        groups: reference id to its group of near-duplicates; an id that is missing is a group of its own.
    """
    by_row = [[groups.get(one, one) for one in matches] for matches in flagged["match_ids"].to_pylist()]
    flagged = _replace(flagged, "match_groups", by_row)
    flagged = _replace(flagged, "reach", [len(set(row)) for row in by_row])
    return _replace(flagged, "component", _components(flagged["prompt_id"].to_pylist(), by_row).tolist())


def _components(prompts: Sequence[str], groups: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Component of each prompt, numbered from 1: most prompts first, ties by the smallest prompt id."""
    if not prompts:
        return np.zeros(0, np.int64)
    nodes = {group: len(prompts) + place for place, group in enumerate(sorted({g for row in groups for g in row}))}
    own = np.repeat(np.arange(len(prompts)), [len(row) for row in groups])
    reached = np.array([nodes[group] for row in groups for group in row], np.int64)
    labels_N = duplicates.components(len(prompts) + len(nodes), own, reached)[: len(prompts)]
    first: dict[int, str] = {}
    size: dict[int, int] = defaultdict(int)
    for prompt, label in zip(prompts, labels_N.tolist(), strict=True):
        first[label] = min(prompt, first.get(label, prompt))
        size[label] += 1
    order = {label: place for place, label in enumerate(sorted(first, key=lambda one: (-size[one], first[one])), 1)}
    return np.array([order[label] for label in labels_N.tolist()], np.int64)


def edge_table(flagged: pa.Table) -> pa.Table:
    """Return the graph (`records.EDGES`) with one row per flagged prompt and training image.

    Rows are sorted by prompt, then by the number of generations, most first.
    """
    columns: dict[str, list[Any]] = {name: [] for name in EDGES.names}
    names = ("match_ids", "match_groups", "match_counts")
    for row in flagged.select(["prompt_id", "component", *names]).sort_by("prompt_id").to_pylist():
        for match, group, count in zip(*(row[name] for name in names), strict=True):
            values = (row["prompt_id"], match, group, count, row["component"])
            for name, value in zip(EDGES.names, values, strict=True):
                columns[name].append(value)
    return pa.table(columns, schema=EDGES)


def component_table(flagged: pa.Table) -> pa.Table:
    """Return one row per component (`records.COMPONENTS`), largest first; the flagged list is sorted by severity."""
    found: dict[int, dict[str, Any]] = {}
    fields = ["component", "prompt_id", "caption", "label", "severity", "match_ids", "match_groups", "count"]
    for row in flagged.select(fields).to_pylist():
        one = found.setdefault(
            row["component"],
            {"component": row["component"], "prompts": 0, "rows": 0, "severity": 0.0}
            | {"worst_prompt": row["prompt_id"], "caption": row["caption"], "references": set(), "groups": set()}
            | dict.fromkeys(MEMORISED, 0),
        )
        one["prompts"] += 1
        one["rows"] += row["count"]
        one["severity"] += row["severity"]
        one[row["label"]] += 1
        one["references"].update(row["match_ids"])
        one["groups"].update(row["match_groups"])
    rows = []
    for number in sorted(found):
        one = found[number]
        ids = sorted(one.pop("references"))
        rows.append(one | {"images": len(one["groups"]), "reference_ids": ids, "severity": one["severity"]})
    return pa.Table.from_pylist(rows, schema=COMPONENTS)


def removal_list(flagged: pa.Table, rule: VerdictConfig, urls: Mapping[str, str | None]) -> pa.Table:
    """Return the training images to drop, in the order that cures most prompts soonest (`records.REMOVAL`).

    A prompt counts as cured if the generations that match no dropped image would not flag it. Images are taken
    greedily: next comes the group that cures most, counting a prompt that needs several groups by the part of the way
    it takes it; ties go to the smaller id. All near-duplicates of a group stand together under one rank, for dropping
    one of them leaves the others in the training set. That a model without these images would not reproduce them is the
    assumption, not a measurement.
    """
    state = _Cure(flagged, rule)
    duplicates_of = _group_members(flagged)
    rows: list[dict[str, Any]] = []
    for rank, (group, cured, total) in enumerate(state.order(), 1):
        ids = duplicates_of[group]
        rows += [
            {
                "rank": rank,
                "reference_id": one,
                "url": urls.get(one),
                "duplicate_of": None if one == group else group,
                "copies": len(ids),
                "prompts": len(state.prompts_of[group]),
                "severity": float(sum(state.severity[prompt] for prompt in state.prompts_of[group])),
                "cured": cured,
                "cured_total": total,
            }
            for one in ids
        ]
    return pa.Table.from_pylist(rows, schema=REMOVAL)


def _group_members(flagged: pa.Table) -> dict[str, list[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    pairs = zip(flagged["match_ids"].to_pylist(), flagged["match_groups"].to_pylist(), strict=True)
    for ids, groups in pairs:
        for one, group in zip(ids, groups, strict=True):
            found[group].add(one)
    return {group: sorted(ids) for group, ids in found.items()}


class _Cure:
    """This is what is left of every prompt while groups are dropped one after another."""

    def __init__(self, flagged: pa.Table, rule: VerdictConfig) -> None:
        self.severity: list[float] = flagged["severity"].to_pylist()
        self.counts: list[dict[str, int]] = []
        self.prompts_of: dict[str, list[int]] = defaultdict(list)
        self.excess: list[int] = []  # how many memorised generations must go before the prompt is not flagged
        names = ("samples", "match_groups", "match_counts")
        for number, (samples, groups, counts) in enumerate(zip(*(flagged[n].to_pylist() for n in names), strict=True)):
            by_group: dict[str, int] = defaultdict(int)
            for group, count in zip(groups, counts, strict=True):
                by_group[group] += count
            self.counts.append(by_group)
            for group in by_group:
                self.prompts_of[group].append(number)
            # needed() is a float (0.3 of 10): flagged while memorised >= needed
            least = int(np.ceil(needed(samples, rule)))
            self.excess.append(sum(by_group.values()) - least + 1)

    def credit(self, group: str) -> float:
        """Return how far dropping `group` takes its prompts: 1 for each that it cures, a part for the others."""
        return sum(
            min(1.0, self.counts[prompt][group] / self.excess[prompt])
            for prompt in self.prompts_of[group]
            if self.excess[prompt] > 0
        )

    def order(self) -> list[tuple[str, int, int]]:
        """Yield (group, prompts that it cures, prompts cured so far), most useful first.

        Groups that no longer help come last.
        """
        current = {group: self.credit(group) for group in self.prompts_of}
        heap = [(-value, group) for group, value in current.items()]
        heapq.heapify(heap)
        found: list[tuple[str, int, int]] = []
        total = 0
        while heap:
            value, group = heapq.heappop(heap)
            if group not in current or -value != current[group]:
                continue  # dropped already, or another credit by now: its newer entry is in the heap
            del current[group]
            cured = self._drop(group)
            total += cured
            found.append((group, cured, total))
            # Only groups that share a prompt with this one can have changed.
            for other in {g for prompt in self.prompts_of[group] for g in self.counts[prompt]} & current.keys():
                changed = self.credit(other)
                if changed != current[other]:
                    current[other] = changed
                    heapq.heappush(heap, (-changed, other))
        return found

    def _drop(self, group: str) -> int:
        cured = 0
        for prompt in self.prompts_of[group]:
            before = self.excess[prompt]
            self.excess[prompt] = before - self.counts[prompt][group]
            cured += before > 0 >= self.excess[prompt]
        return cured


def _replace(flagged: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    field = FLAGGED.field(name)
    return flagged.set_column(flagged.schema.get_field_index(name), field, pa.array(values, type=field.type))
