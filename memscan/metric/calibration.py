"""This module chooses thresholds on a world whose truth is known, and records their provenance.

The pair of thresholds maximises macro-F1 over the labels, subject to a bound on the share of NM rows that get another
label. The bound applies to the upper end of the Clopper-Pearson interval of this share, because 0 of 100 says little.
In addition to the thresholds, there is a logistic curve per region (Platt 1999), which gives the probability of a
score. Its slope says how quickly copies and other pairs change places around the threshold.

Thresholds belong to a canvas, a variant and the models that produced the scores, and must never be used to report on
the world that chose them: a `Calibration` names all of these.

Thresholds are searched on a grid of step 0.002; an optimum narrower than that is due to chance. If several pairs are
equally good the one deepest inside their area is taken, so that new data may move most before a label changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from memscan.config import MetricConfig
from memscan.errors import ConfigError, InputError, MemscanError
from memscan.intervals import upper_limits
from memscan.io import storage
from memscan.records import Label

FORMAT = 2
STEPS = 500

Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Curve = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_GRID: Floats = np.arange(1, STEPS) / STEPS


@dataclass(frozen=True)
class Calibration:
    """This is a pair of thresholds with its provenance, and with the figures that it achieved where it was chosen.

    Attributes:
        variant, canvas: of the metric that the thresholds belong to.
        foreground_threshold, background_threshold: in (0, 1).
        max_false_positive_rate, confidence: the bound that was asked for, and how sure it had to be.
        false_positive_rate: share of NM rows with another label, on the calibration rows.
        false_positive_bound: one-sided upper Clopper-Pearson limit of that share at `confidence`.
        macro_f1, f1: mean over the labels that occur, and each of them.
        counts: rows by true label.
        slack: both thresholds can move by this distance, together or alone, before anything changes.
        foreground_curve, background_curve: (centre, slope) of the logistic curve of each region's score.
        source: where the rows come from (a world's seed and the hash of its manifest).
        models: specification ids by role (generator, segmenter, embedder).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    variant: str
    canvas: Annotated[int, Field(ge=1)]
    foreground_threshold: Share
    background_threshold: Share
    max_false_positive_rate: Share
    confidence: Share
    false_positive_rate: Share
    false_positive_bound: Share
    macro_f1: Share
    f1: dict[str, Share]
    counts: dict[str, Annotated[int, Field(ge=0)]]
    slack: Finite
    foreground_curve: Curve
    background_curve: Curve
    source: str
    models: dict[str, str]

    def probability(self, region: Literal["foreground", "background"], score: float) -> float:
        """Return the probability, in [0, 1], that a region with this score is copied.

        Copies and others are taken as equally frequent.

        It is a statement about the calibration rows: of how clearly a score lies on one side, not of how frequent
        copies are where it is used.
        """
        centre, slope = self.foreground_curve if region == "foreground" else self.background_curve
        return float(expit(slope * (score - centre)))

    def apply(self, config: MetricConfig) -> MetricConfig:
        """Return the configuration with these thresholds. Raises ConfigError for another variant or canvas."""
        if (config.variant, config.canvas) != (self.variant, self.canvas):
            raise ConfigError(
                f"thresholds of variant {self.variant!r} on canvas {self.canvas} are not valid for "
                f"{config.variant!r} on {config.canvas}",
                where=self.source,
                hint="calibrate again",
            )
        return config.model_copy(
            update={
                "foreground_threshold": self.foreground_threshold,
                "background_threshold": self.background_threshold,
                "threshold_source": (
                    f"calibrated on {self.source}: macro-F1 {self.macro_f1:.3f}, false positives "
                    f"{self.false_positive_rate:.4f} of {self.counts.get(Label.NM.value, 0)} NM rows, at most "
                    f"{self.false_positive_bound:.4f} at {self.confidence:.0%} confidence"
                ),
            }
        )

    def save(self, path: str) -> None:
        """Write as JSON, local or s3://."""
        storage.write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str) -> Calibration:
        """Read what `save` wrote. Raises InputError if it is missing or is not such a file."""
        data = storage.read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"is not a calibration of format {FORMAT}", where=path)
        values = {key: value for key, value in data.items() if key != "format"}
        try:
            return _parser().validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(f"is not a calibration: {name!r}: {first['msg']}", where=path) from error


@functools.cache
def _parser() -> TypeAdapter[Calibration]:
    return TypeAdapter(Calibration)


def calibrate(
    foreground: npt.ArrayLike,
    background: npt.ArrayLike,
    labels: Sequence[Label | str],
    *,
    config: MetricConfig,
    source: str,
    models: Mapping[str, str],
    max_false_positive_rate: float = 0.02,
    confidence: float = 0.95,
) -> Calibration:
    """Choose the threshold pair on the rows of one world.

    Args:
        foreground, background: scores in [0, 1], of shape (N,), or (N, K) with all K candidates of a generation (NaN
            where it has fewer), labelled as `FbMem.match` does: by the most severe candidate.
        labels: the true label of each row.
        config: gives variant and canvas.
        source, models: provenance, see `Calibration`.
        max_false_positive_rate: bound on the share of NM rows with another label.
        confidence: one-sided confidence with which the share must lie under the bound, in [0, 1); 0 takes the share as
            it was counted.

    Raises:
        ValueError: shapes differ, scores are outside [0, 1], a row has no candidate, or there is no NM or no other row.
        MemscanError: no thresholds keep the false-positive rate.
    """
    f_NK, b_NK = _checked(foreground, background)
    truth = [Label(label) for label in labels]
    if len(truth) != len(f_NK):
        raise ValueError(f"{len(truth)} labels for {len(f_NK)} rows")
    if Label.NM not in truth or set(truth) == {Label.NM}:
        raise ValueError("calibration needs NM rows and rows of at least one other label")
    rows = {label: [i for i, value in enumerate(truth) if value is label] for label in Label if label in truth}
    table = {label: _predicted(f_NK[chosen], b_NK[chosen]) for label, chosen in rows.items()}
    ordinary = truth.count(Label.NM)
    false_positives = (ordinary - table[Label.NM][Label.NM]) / ordinary
    f1 = {label: _f1(table, label, truth.count(label)) for label in table}
    macro = np.mean(list(f1.values()), axis=0)
    bound = _upper(ordinary - table[Label.NM][Label.NM], ordinary, confidence)
    allowed = bound <= max_false_positive_rate + 1e-12
    if not allowed.any():
        raise MemscanError(
            f"no thresholds keep the false-positive rate at {max_false_positive_rate:g}: the lowest bound that "
            f"{ordinary} NM rows give is {bound.min():.4f}",
            where=source,
            hint="calibrate on more rows, or allow a higher rate",
        )
    best = allowed & (macro >= macro[allowed].max() - 1e-9)
    i, j, depth = _deepest(best)
    return Calibration(
        variant=config.variant,
        canvas=config.canvas,
        foreground_threshold=float(_GRID[i]),
        background_threshold=float(_GRID[j]),
        max_false_positive_rate=float(max_false_positive_rate),
        confidence=float(confidence),
        false_positive_bound=float(bound[i, j]),
        false_positive_rate=float(false_positives[i, j]),
        macro_f1=float(macro[i, j]),
        f1={label.value: float(values[i, j]) for label, values in f1.items()},
        counts={label.value: truth.count(label) for label in table},
        slack=depth / STEPS,
        foreground_curve=_curve(f_NK, [label in (Label.VM, Label.FM) for label in truth]),
        background_curve=_curve(b_NK, [label in (Label.VM, Label.BM) for label in truth]),
        source=source,
        models=dict(models),
    )


def _checked(foreground: npt.ArrayLike, background: npt.ArrayLike) -> tuple[Floats, Floats]:
    f, b = np.asarray(foreground, dtype=np.float64), np.asarray(background, dtype=np.float64)
    if f.shape != b.shape or f.ndim not in (1, 2) or f.size == 0:
        raise ValueError(f"scores of shape {f.shape} and {b.shape}: expected (N,) or (N, K), both equal")
    f_NK, b_NK = f.reshape(len(f), -1), b.reshape(len(b), -1)
    missing = np.isnan(f_NK)
    if (missing != np.isnan(b_NK)).any() or missing.all(axis=1).any():
        raise ValueError("a candidate lacks one of its scores, or a row has no candidate")
    present = np.concatenate([f_NK[~missing], b_NK[~missing]])
    if present.min() < 0 or present.max() > 1:
        raise ValueError("scores must lie in [0, 1]")
    return f_NK, b_NK


def _predicted(f_NK: Floats, b_NK: Floats) -> dict[Label, Counts]:
    """Return the number of rows that get each label, for every (foreground, background) threshold pair of the grid."""
    size = len(_GRID) + 1
    verbatim, best = np.zeros((size, size), np.int64), np.zeros((size, size), np.int64)
    # A score fires for the thresholds below index `fires`; NaN (no candidate) for none.
    fires_f, fires_b = (np.searchsorted(_GRID, np.nan_to_num(s, nan=-1.0), side="right") for s in (f_NK, b_NK))
    for row_f, row_b in zip(fires_f, fires_b, strict=True):
        best[row_f.max(), row_b.max()] += 1
        # Thresholds at which some candidate is VM: a union of rectangles from the origin, by inclusion-exclusion.
        front = _pareto(row_f, row_b)
        for index, (f, b) in enumerate(front):
            verbatim[f, b] += 1
            if index + 1 < len(front):
                verbatim[front[index + 1][0], b] -= 1
    vm, both = _at_least(verbatim)[1:, 1:], _at_least(best)
    any_f, any_b = both[1:, :1], both[:1, 1:]
    fm, bm = any_f - vm, any_b - both[1:, 1:]
    return {Label.VM: vm, Label.FM: fm, Label.BM: bm, Label.NM: len(f_NK) - vm - fm - bm}


def _pareto(f_K: Counts, b_K: Counts) -> list[tuple[int, int]]:
    """Candidates that no other one beats in both scores, by falling foreground and so rising background."""
    front: list[tuple[int, int]] = []
    for f, b in sorted(zip(f_K.tolist(), b_K.tolist(), strict=True), key=lambda pair: (-pair[0], -pair[1])):
        if not front or b > front[-1][1]:
            front.append((f, b))
    return front


def _at_least(histogram: Counts) -> Counts:
    """Suffix sums over both axes."""
    return np.asarray(histogram[::-1, ::-1].cumsum(axis=0).cumsum(axis=1)[::-1, ::-1])


def _f1(table: Mapping[Label, Mapping[Label, Counts]], label: Label, count: int) -> Floats:
    predicted = sum(row[label] for row in table.values())
    return np.asarray(2 * table[label][label] / (predicted + count))


def _upper(events: Counts, trials: int, confidence: float) -> Floats:
    """One-sided upper Clopper-Pearson limit of a share; the share itself at a confidence of 0."""
    if confidence <= 0:
        return np.asarray(events / trials)
    return upper_limits(events, trials, confidence)


def _curve(scores_NK: Floats, copied: Sequence[bool]) -> list[float]:
    """Centre and slope of the logistic curve through the best score of each row, both kinds weighing the same.

    Targets are those of Platt (1999), (n + 1) / (n + 2) for copies and 1 / (n + 2) for others: without them rows that
    separate perfectly would make the curve a step. A slope that falls (no signal) is given as 0.
    """
    best_N, truth_N = np.nanmax(scores_NK, axis=1), np.asarray(copied)
    ones, zeros = int(truth_N.sum()), int((~truth_N).sum())
    if not ones or not zeros:
        return [0.5, 0.0]
    target_N = np.where(truth_N, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    weight_N = np.where(truth_N, 0.5 / ones, 0.5 / zeros)
    model = LogisticRegression(C=1e6, max_iter=1000)
    model.fit(
        np.tile(best_N, 2)[:, None],
        np.repeat([1, 0], len(best_N)),
        np.concatenate([target_N, 1 - target_N]) * np.tile(weight_N, 2) * len(best_N),
    )
    slope = float(model.coef_[0, 0])
    return [-float(model.intercept_[0]) / slope, slope] if slope > 0 else [0.5, 0.0]


def _deepest(area: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """Return a point of the area that is furthest from its edge (chessboard distance), and that distance less one.

    The area is peeled layer by layer; of the last layer the point nearest its own centre is taken.
    """
    depth, layer = 0, area
    while True:
        padded = np.pad(layer, 1)
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        inner = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
        if not inner.any():
            break
        depth, layer = depth + 1, inner
    points = np.argwhere(layer)
    distance = ((points - points.mean(axis=0)) ** 2).sum(axis=1)
    i, j = points[int(np.argmin(distance))]
    return int(i), int(j), depth
