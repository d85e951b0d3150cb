"""This module turns batches of census rows into counts that can be added, and into rows of the flagged list.

Tallies hold integers only, so their sum does not depend on the order of the batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from memscan.census import screened as screened_census
from memscan.census.matches import alike
from memscan.census.screened import PASS
from memscan.census.signals import count_signals
from memscan.census.verdict import Verdict, verdict
from memscan.config import MetricConfig, VerdictConfig
from memscan.errors import RunError
from memscan.records import ANY, FLAGGED, LABELS, MEMORISED, Status

SCORE_BINS = 40


CENSUS_COLUMNS = ["prompt_id", "caption", "count", "source", "row", "url", "status", "reason"]
# `decision` is absent in runs of older versions and null without a screen
CENSUS_COLUMNS += ["generations", "decision"]


FILE = "census_file"  # of a batch that joins several files: which of them each row is from


@dataclass(frozen=True)
class Tally:
    """A tally holds counts over census rows. Tallies can be added to join batches.

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
class BatchVerdicts:
    """This is the outcome of a batch: its counts and its flagged rows (`records.FLAGGED`, `match_urls` still null)."""

    tally: Tally
    flagged: pa.Table


def judge_rows(
    table: pa.Table,
    rule: VerdictConfig,
    metric: MetricConfig,
    *,
    first_samples: int | None = None,
) -> BatchVerdicts:
    """Give verdicts on a batch of census rows.

    They need the columns `CENSUS_COLUMNS` of `records.CENSUS`, and no evidence.

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
    _refuse(
        table,
        done_N & ((size_N == 0) != (decision_N == PASS)),
        "done without a generation, or passed by the screen with one",
    )
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
    return BatchVerdicts(tally, pa.Table.from_pylist(flagged, schema=FLAGGED))


def join_flagged(tables: Iterable[pa.Table]) -> pa.Table:
    """Return the flagged list of all batches, sorted by severity, then margin, then id, for any order of the input."""
    joined = pa.concat_tables([FLAGGED.empty_table(), *tables])
    return joined.sort_by([("severity", "descending"), ("margin", "descending"), ("prompt_id", "ascending")])


def with_urls(flagged: pa.Table, urls: Mapping[str, str | None]) -> pa.Table:
    """Fill the column `match_urls`, parallel to `match_ids`, with null if a training image has no URL."""
    filled = [[urls.get(match) for match in matches] for matches in flagged["match_ids"].to_pylist()]
    where = flagged.schema.get_field_index("match_urls")
    return flagged.set_column(where, FLAGGED.field("match_urls"), pa.array(filled, type=pa.list_(pa.string())))


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
    """Return a row of the list; components, clusters and groups of near-duplicates are not known yet."""
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
