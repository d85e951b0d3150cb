"""From generations to verdicts, and from verdicts to rates.

A census row holds a prompt's generations, each with FB-Mem's label. Three questions are answered here:

* `verdict`: is this prompt flagged, as what, how severely, on what evidence?
* `judge`: the same for a batch of census rows: a `Tally` of counts that adds up over batches, and the flagged rows.
* `summarise`: rates with intervals, one-to-many and severity, from the tally of all batches and the flagged list.

Tallies hold integers only, so their sum does not depend on the order of the batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from memscan import screened_census
from memscan.config import MetricConfig, ScreenConfig, VerdictConfig
from memscan.errors import RunError
from memscan.rates import ClusterMoments, clustered_interval, rate
from memscan.reached import alike, matched
from memscan.records import FLAGGED, Label, Status
from memscan.screened_census import ANY as ANY
from memscan.screened_census import LABELS as LABELS
from memscan.screened_census import MEMORISED as MEMORISED
from memscan.screened_census import PASS
from memscan.signals import agreement_of, count_signals, mean_signals

SCORE_BINS = 40
CENSUS_COLUMNS = ["prompt_id", "caption", "count", "source", "row", "url", "status", "reason"]
# `decision` is absent in runs of older versions and null without a screen
CENSUS_COLUMNS += ["generations", "decision"]
FILE = "census_file"  # of a batch that joins several files: which of them each row is from


@dataclass(frozen=True)
class Verdict:
    """What a prompt's generations say about it.

    `best` is the position of the best evidence in the generations that were given; None where the prompt is not
    flagged. `margin` is how far that generation's deciding score lies above its threshold, in score units.
    `match_counts` says how many memorised generations match each of `match_ids`. `signals` are means over the
    generations that have the signal; `agreement` see `agreement_of`.
    """

    label: Label
    severity: float
    share: float
    samples: int
    best: int | None = None
    margin: float = 0.0
    match_ids: tuple[str, ...] = ()
    match_counts: tuple[int, ...] = ()
    noise_norm: float | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None

    @property
    def flagged(self) -> bool:
        return self.label is not Label.NM


def margin(label: Label, foreground: float, background: float, metric: MetricConfig) -> float:
    """How far the deciding score lies above its threshold: VM the lesser of both, FM foreground, BM background.

    For NM, where no score decided, the greater of both (negative).
    """
    over_foreground = foreground - metric.foreground_threshold
    over_background = background - metric.background_threshold
    if label is Label.VM:
        return min(over_foreground, over_background)
    if label is Label.FM:
        return over_foreground
    if label is Label.BM:
        return over_background
    return max(over_foreground, over_background)


def needed(samples: int, rule: VerdictConfig) -> float:
    """How many of `samples` generations must be memorised to flag a prompt; 0.3 of 10 is 3, whatever floats say."""
    return max(1.0, rule.min_share * samples - 1e-9)


def verdict(generations: Sequence[Mapping[str, Any]], rule: VerdictConfig, metric: MetricConfig) -> Verdict:
    """Judge one prompt by its generations (rows of `records.GENERATION`, any order).

    Flagged when at least `rule.min_share` of the generations are not NM. The label is the most frequent one among the
    memorised generations, ties to the more severe (VM, FM, BM). The best evidence is the generation of that label with
    the largest margin. Severity is the mean harm over all generations. `match_ids` are the distinct training images of
    the memorised generations, most frequent first, ties to the best evidence's, then by id; NM matches never count.

    Raises:
        ValueError: no generations, or a label that is not one of the four.
    """
    if not generations:
        raise ValueError("a verdict needs at least one generation")
    labels = [Label(generation["label"]) for generation in generations]
    counts = Counter(label for label in labels if label is not Label.NM)
    memorised = sum(counts.values())
    harm = harm_of(rule)
    samples = len(labels)
    severity = sum(harm[label.value] for label in labels) / samples
    share = memorised / samples
    norms = [float(g["noise_norm"]) for g in generations if g.get("noise_norm") is not None]
    norm = sum(norms) / len(norms) if norms else None
    if memorised < needed(samples, rule):
        return Verdict(Label.NM, severity, share, samples, noise_norm=norm, signals=mean_signals(generations))
    label = max(counts, key=lambda one: (counts[one], -LABELS.index(one.value)))
    margins = [margin(label, float(g["foreground"]), float(g["background"]), metric) for g in generations]
    best = max(
        (position for position, one in enumerate(labels) if one is label),
        key=lambda p: (
            margins[p],
            generations[p]["foreground"] + generations[p]["background"],
            -generations[p]["sample"],
        ),
    )
    matches = matched(generations, str(generations[best]["match_id"]))
    return Verdict(
        label,
        severity,
        share,
        samples,
        best,
        margins[best],
        tuple(matches),
        tuple(matches.values()),
        norm,
        mean_signals(generations),
        agreement_of(label, [g for g, one in zip(generations, labels, strict=True) if one is label]),
    )


def harm_of(rule: VerdictConfig) -> dict[str, float]:
    """Harm per label; one that a configuration leaves out keeps its published value (VM 2, FM 1.5, BM 0.5, NM 0)."""
    harm = {str(label): value for label, value in {**VerdictConfig().harm, **rule.harm}.items()}
    return {label: harm[label] for label in LABELS}


@dataclass(frozen=True)
class Tally:
    """Counts over census rows. Add tallies to join batches.

    `prompts` are distinct captions, `rows` the input rows folded into them. `moments` are the sums over done prompts
    that give the spread of a generation-level rate: ("", "nn"), (label, "kk"), (label, "kn"). `scores` counts all
    generations by foreground and background score, in `SCORE_BINS` equal bins of [0, 1] each.
    """

    rows: int = 0
    prompts: int = 0
    done: int = 0
    done_rows: int = 0
    generations: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    rejected_rows: Counter[str] = field(default_factory=Counter)
    prompt_labels: Counter[str] = field(default_factory=Counter)
    row_labels: Counter[str] = field(default_factory=Counter)
    generation_labels: Counter[str] = field(default_factory=Counter)
    moments: Counter[tuple[str, str]] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)  # generations that have a signal, by its name
    screened: Counter[tuple[str, str]] = field(default_factory=Counter)  # see `screened_census.count`
    scores: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Judgement:
    """The outcome of a batch: its counts and its flagged rows (`records.FLAGGED`, `match_urls` still null)."""

    tally: Tally
    flagged: pa.Table


def judge(
    table: pa.Table,
    rule: VerdictConfig,
    metric: MetricConfig,
    *,
    first_samples: int | None = None,
) -> Judgement:
    """Judge a batch of census rows (at least `CENSUS_COLUMNS` of `records.CENSUS`; generations without evidence do).

    Args:
        table: the flagged list names the file of a row where there is a column `FILE`.
        first_samples: of a screen with adaptive samples: the generations that every scanned prompt has.

    Raises:
        RunError: a row is neither done nor rejected, is done without generations though the screen did not pass it, or
            bears an unknown label.
    """
    table = table.combine_chunks()
    done_N, weight_N = _column(table, "status") == Status.DONE.value, _column(table, "count").astype(np.int64)
    rejected_N = _column(table, "status") == Status.REJECTED.value
    _refuse(table, ~(done_N | rejected_N), "neither done nor rejected")
    counts_NL = _label_counts(table)
    counts_NL[~done_N] = 0
    size_N = counts_NL.sum(axis=1)
    decision_N = screened_census.decisions(table)
    _refuse(table, done_N & ((size_N == 0) != (decision_N == PASS)), "done without a generation, or passed with some")
    memorised_N = counts_NL[:, : len(MEMORISED)].sum(axis=1)
    needed_N = np.maximum(1.0, rule.min_share * size_N - 1e-9)  # as `needed`, for all rows at once
    flagged_N = done_N & (memorised_N >= needed_N)
    # argmax takes the first of equals, and the labels stand most severe first
    label_N = np.where(flagged_N, counts_NL[:, : len(MEMORISED)].argmax(axis=1), len(MEMORISED))
    tally = Tally(
        rows=int(weight_N.sum()),
        prompts=table.num_rows,
        done=int(done_N.sum()),
        done_rows=int(weight_N[done_N].sum()),
        generations=int(size_N.sum()),
        rejected=_by_reason(table, rejected_N, np.ones_like(weight_N)),
        rejected_rows=_by_reason(table, rejected_N, weight_N),
        prompt_labels=_count_labels(label_N[done_N], np.ones_like(weight_N[done_N])),
        row_labels=_count_labels(label_N[done_N], weight_N[done_N]),
        generation_labels=Counter(dict(zip(LABELS, counts_NL.sum(axis=0).tolist(), strict=True))),
        moments=_moments(counts_NL, size_N),
        screened=screened_census.count(decision_N, done_N, label_N, _label_counts(table, first_samples), weight_N),
        signals=count_signals(table.filter(pa.array(done_N))),
        scores=_scores(table.filter(pa.array(done_N))),
    )
    rows = table.filter(pa.array(flagged_N)).to_pylist()
    flagged = [_flagged_row(row, verdict(row["generations"], rule, metric), row.get(FILE)) for row in rows]
    return Judgement(tally, pa.Table.from_pylist(flagged, schema=FLAGGED))


def join_flagged(tables: Iterable[pa.Table]) -> pa.Table:
    """The flagged list of all batches, worst first: by severity, then margin, then id; no matter how rows came in."""
    joined = pa.concat_tables([FLAGGED.empty_table(), *tables])
    return joined.sort_by([("severity", "descending"), ("margin", "descending"), ("prompt_id", "ascending")])


def with_urls(flagged: pa.Table, urls: Mapping[str, str | None]) -> pa.Table:
    """Fill `match_urls`, parallel to `match_ids`, with null where a training image has no URL."""
    filled = [[urls.get(match) for match in matches] for matches in flagged["match_ids"].to_pylist()]
    where = flagged.schema.get_field_index("match_urls")
    return flagged.set_column(where, FLAGGED.field("match_urls"), pa.array(filled, type=pa.list_(pa.string())))


def summarise(
    tally: Tally, flagged: pa.Table, rule: VerdictConfig, screen: ScreenConfig | None = None
) -> dict[str, Any]:
    """The figures of `census.json`: counts, class mix by prompt, input row and generation, one-to-many, severity.

    Under a screen the counts are of what was found, and rates and intervals, by prompt, input row and generation, are
    estimates for all prompts from the audit (`screened_census`); input rows of passed prompts stand apart.
    """
    document = _found(tally, flagged, rule)
    if screen is not None:
        document["screen"] = screened_census.summary(tally.screened, screen)
        for name in ("prompts", "generations"):
            screened_census.estimate_into(document[name], tally.screened, name)
        screened_census.separate_rows(document["rows"], tally.screened)
    return document


def _found(tally: Tally, flagged: pa.Table, rule: VerdictConfig) -> dict[str, Any]:
    rejected = {reason: tally.rejected[reason] for reason in sorted(tally.rejected)}
    return {
        "counts": {
            "rows_in": tally.rows,
            "distinct_prompts": tally.prompts,
            "done": tally.done,
            "rejected": sum(rejected.values()),
            "rejected_by_reason": rejected,
            "rejected_rows_by_reason": {reason: tally.rejected_rows[reason] for reason in sorted(tally.rejected_rows)},
            "generations": tally.generations,
            "flagged": flagged.num_rows,
        },
        "prompts": _mix(tally.prompt_labels, tally.done),
        "generations": _generation_mix(tally),
        "rows": {
            "total": tally.done_rows,
            "passed": 0,
            "classes": {label: _share(tally.row_labels[label], tally.done_rows) for label in LABELS},
            "memorised": _share(_any(tally.row_labels), tally.done_rows),
        },
        "one_to_many": one_to_many(flagged),
        "severity": _severity(tally, flagged, rule),
        "signals": {"generations": {name: tally.signals[name] for name in sorted(tally.signals)}},
        "scores": {"bins": SCORE_BINS, "cells": [[*cell, n] for cell, n in sorted(tally.scores.items()) if n]},
    }


def one_to_many(flagged: pa.Table) -> dict[str, Any]:
    """How many distinct training images a flagged prompt's memorised generations reach (Di et al. 2025, section 5).

    Near-duplicates of one image count once: `reach` of the flagged list.
    """
    reach = flagged["reach"].to_numpy()
    images = pc.count_distinct(pc.list_flatten(flagged["match_ids"])).as_py()
    groups = pc.count_distinct(pc.list_flatten(flagged["match_groups"])).as_py()
    histogram = Counter(reach.tolist())
    return {
        "flagged": flagged.num_rows,
        "more_than_one": rate(int((reach > 1).sum()), flagged.num_rows).as_dict(),
        "median": float(np.median(reach)) if reach.size else None,
        "mean": float(reach.mean()) if reach.size else None,
        "maximum": int(reach.max()) if reach.size else None,
        "histogram": {str(images): histogram[images] for images in sorted(histogram)},
        "training_images_reached": images,
        "groups_reached": groups,
        "components": pc.count_distinct(flagged["component"]).as_py(),
    }


def _severity(tally: Tally, flagged: pa.Table, rule: VerdictConfig) -> dict[str, Any]:
    harm = harm_of(rule)
    total = sum(tally.generation_labels[label] * harm[label] for label in LABELS)
    return {
        "mean_generation": total / tally.generations if tally.generations else None,
        "mean_flagged_prompt": pc.mean(flagged["severity"]).as_py(),
        "total": total,
        "harm": harm,
    }


def _mix(labels: Counter[str], total: int) -> dict[str, Any]:
    return {
        "total": total,
        "classes": {label: rate(labels[label], total).as_dict() for label in LABELS},
        "memorised": rate(_any(labels), total).as_dict(),
    }


def _generation_mix(tally: Tally) -> dict[str, Any]:
    mix = _mix(tally.generation_labels, tally.generations)
    for label, entry in [*mix["classes"].items(), (ANY, mix["memorised"])]:
        sums = (tally.moments["", "nn"], tally.moments[label, "kn"], tally.moments[label, "kk"])
        low, high = clustered_interval(ClusterMoments(tally.done, tally.generations, entry["count"], *sums))
        entry.update(clustered_low=low, clustered_high=high)
    return mix


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "total": total, "rate": count / total if total else None}


def _any(labels: Counter[str]) -> int:
    return sum(labels[label] for label in MEMORISED)


def _label_counts(table: pa.Table, first_samples: int | None = None) -> npt.NDArray[np.int64]:
    generations = table["generations"]
    code = pc.index_in(pc.struct_field(pc.list_flatten(generations), "label"), value_set=pa.array(LABELS))
    parent = pc.list_parent_indices(generations).to_numpy()
    if first_samples is not None:
        sample = pc.struct_field(pc.list_flatten(generations), "sample").to_numpy()
        code, parent = code.filter(pa.array(sample < first_samples)), parent[sample < first_samples]
    if code.null_count:
        row = int(parent[pc.is_null(code).to_numpy(zero_copy_only=False)][0])
        where = f"prompt {table['prompt_id'][row]}"
        raise RunError(f"a generation has a label that is none of {', '.join(LABELS)}", where=where)
    flat = parent * len(LABELS) + code.to_numpy()
    return np.bincount(flat, minlength=table.num_rows * len(LABELS)).reshape(-1, len(LABELS)).astype(np.int64)


def _moments(counts_NL: npt.NDArray[np.int64], size_N: npt.NDArray[np.int64]) -> Counter[tuple[str, str]]:
    sums: Counter[tuple[str, str]] = Counter({("", "nn"): int((size_N**2).sum())})
    hits = {label: counts_NL[:, position] for position, label in enumerate(LABELS)}
    hits[ANY] = counts_NL[:, : len(MEMORISED)].sum(axis=1)
    for label, k_N in hits.items():
        sums[label, "kk"], sums[label, "kn"] = int((k_N**2).sum()), int((k_N * size_N).sum())
    return sums


def _scores(table: pa.Table) -> Counter[tuple[int, int]]:
    flat = pc.list_flatten(table["generations"])
    place = [
        np.clip((pc.struct_field(flat, name).to_numpy() * SCORE_BINS).astype(np.int64), 0, SCORE_BINS - 1)
        for name in ("foreground", "background")
    ]
    cells = np.bincount(place[0] * SCORE_BINS + place[1], minlength=SCORE_BINS**2)
    return Counter({divmod(int(cell), SCORE_BINS): int(cells[cell]) for cell in np.flatnonzero(cells)})


def _count_labels(label_N: npt.NDArray[np.int64], weight_N: npt.NDArray[np.int64]) -> Counter[str]:
    return Counter({label: int(weight_N[label_N == position].sum()) for position, label in enumerate(LABELS)})


def _by_reason(table: pa.Table, mask_N: npt.NDArray[np.bool_], weight_N: npt.NDArray[np.int64]) -> Counter[str]:
    counts: Counter[str] = Counter()
    reasons = table["reason"].filter(pa.array(mask_N)).to_pylist()
    for reason, weight in zip(reasons, weight_N[mask_N].tolist(), strict=True):
        counts[reason or "unknown"] += weight
    return counts


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return np.asarray(table[name].to_numpy())


def _refuse(table: pa.Table, bad_N: npt.NDArray[np.bool_], what: str) -> None:
    if bad_N.any():
        row = int(bad_N.argmax())
        raise RunError(f"{int(bad_N.sum())} census rows are {what}", where=f"prompt {table['prompt_id'][row]}")


def _flagged_row(row: Mapping[str, Any], found: Verdict, file: str | None) -> dict[str, Any]:
    """A row of the list; components, clusters and groups of near-duplicates are not known yet."""
    assert found.best is not None
    best = row["generations"][found.best]
    return {
        **{name: row[name] for name in ("prompt_id", "caption", "count", "url", "source", "row")},
        "label": found.label.value,
        "severity": found.severity,
        "share": found.share,
        "samples": found.samples,
        "foreground": best["foreground"],
        "background": best["background"],
        "margin": found.margin,
        "noise_norm": found.noise_norm,
        "match_ids": list(found.match_ids),
        "match_urls": [None] * len(found.match_ids),
        "match_counts": list(found.match_counts),
        "match_groups": list(found.match_ids),
        "alike_ids": alike(row["generations"], dict(zip(found.match_ids, found.match_counts, strict=True))),
        "reach": len(found.match_ids),
        "component": 0,
        "cluster": 0,
        "signals": list(found.signals.items()),
        "agreement": found.agreement,
        "evidence_file": file,
        "evidence_sample": best["sample"],
    }
