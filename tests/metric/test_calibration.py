"""Choice of thresholds against brute force, its bound, its plateau rule, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from memscan.config import MetricConfig
from memscan.errors import ConfigError, InputError, MemscanError
from memscan.io import storage
from memscan.metric import Calibration, PaperFbMem, RegionScores, calibrate
from memscan.records import Label

CONFIG = MetricConfig(canvas=176)
MODELS = {"segmenter": "segmenter:a@0:b", "embedder": "embedder:c@1:d"}
CENTRES = {Label.VM: (0.8, 0.85), Label.FM: (0.8, 0.45), Label.BM: (0.4, 0.85), Label.NM: (0.4, 0.45)}


def _rows(seed: int, spread: float, counts: dict[Label, int]) -> tuple[np.ndarray, np.ndarray, list[Label]]:
    rng = np.random.default_rng(seed)
    labels = [label for label, count in counts.items() for _ in range(count)]
    centres = np.array([CENTRES[label] for label in labels])
    f, b = np.clip(centres + spread * rng.standard_normal(centres.shape), 0, 1).T
    return f, b, labels


def _calibrate(f: np.ndarray, b: np.ndarray, labels: list[Label], bound: float = 0.02) -> Calibration:
    return calibrate(
        f, b, labels, config=CONFIG, source="world 7", models=MODELS, max_false_positive_rate=bound, confidence=0.0
    )


def _evaluate(f: np.ndarray, b: np.ndarray, labels: list[Label], pair: tuple[float, float]) -> tuple[float, float]:
    """Macro-F1 and false-positive rate through the metric itself, candidate by candidate."""
    metric = PaperFbMem(CONFIG.model_copy(update={"foreground_threshold": pair[0], "background_threshold": pair[1]}))
    predicted = []
    for row_f, row_b in zip(f.reshape(len(f), -1), b.reshape(len(b), -1), strict=True):
        candidates = [RegionScores(x, y, 0) for x, y in zip(row_f, row_b, strict=True) if not np.isnan(x)]
        predicted.append(metric.match(candidates)[1])
    truth = [label.value for label in labels]
    names = [label.value for label in predicted]
    macro = f1_score(truth, names, average="macro", labels=sorted(set(truth)), zero_division=0)
    nm = [name for name, label in zip(names, truth, strict=True) if label == "NM"]
    return float(macro), float(np.mean([name != "NM" for name in nm]))


COUNTS = {Label.VM: 15, Label.FM: 12, Label.BM: 10, Label.NM: 60}


@pytest.mark.parametrize(("seed", "bound"), [(0, 1.0), (1, 0.05), (2, 0.0)])
def test_best_pair_of_overlapping_classes(seed: int, bound: float) -> None:
    f, b, labels = _rows(seed, 0.13, COUNTS)
    found = _calibrate(f, b, labels, bound)
    pair = (found.foreground_threshold, found.background_threshold)
    assert _evaluate(f, b, labels, pair) == pytest.approx((found.macro_f1, found.false_positive_rate))
    assert found.false_positive_rate <= bound
    rivals = [_evaluate(f, b, labels, (x, y)) for x in (0.55, 0.6, 0.65, 0.8) for y in (0.6, 0.65, 0.7, 0.9)]
    assert found.macro_f1 >= max((macro for macro, rate in rivals if rate <= bound), default=0) - 1e-9
    assert 0.5 < found.macro_f1 < 1


def test_several_candidates_count_as_the_metric_counts_them() -> None:
    rng = np.random.default_rng(5)
    f, b, labels = _rows(2, 0.1, COUNTS)
    f_NK = np.stack([f, *(np.clip(f - rng.random(len(f)) * 0.5, 0, 1) for _ in range(3))], axis=1)
    b_NK = np.stack([b, *(np.clip(b + rng.normal(0, 0.2, len(b)), 0, 1) for _ in range(3))], axis=1)
    gone = rng.random(f_NK.shape) < 0.3
    gone[:, 0] = False
    f_NK[gone], b_NK[gone] = np.nan, np.nan
    found = _calibrate(f_NK, b_NK, labels, 0.1)
    pair = (found.foreground_threshold, found.background_threshold)
    assert _evaluate(f_NK, b_NK, labels, pair) == pytest.approx((found.macro_f1, found.false_positive_rate))


def test_equally_good_thresholds_give_the_middle() -> None:
    f = np.array([0.9, 0.9, 0.3, 0.3, 0.3])
    b = np.array([0.8, 0.2, 0.8, 0.2, 0.1])
    found = _calibrate(f, b, [Label.VM, Label.FM, Label.BM, Label.NM, Label.NM])
    assert found.foreground_threshold == pytest.approx(0.6, abs=0.003)
    assert found.background_threshold == pytest.approx(0.5, abs=0.003)
    assert found.slack == pytest.approx(0.3, abs=0.006)
    assert found.macro_f1 == 1
    assert found.counts == {"VM": 1, "FM": 1, "BM": 1, "NM": 2}


def test_a_bound_that_cannot_be_kept_is_an_error() -> None:
    with pytest.raises(MemscanError, match=r"false-positive rate at 0\.02"):
        _calibrate(np.array([1.0, 1.0]), np.array([1.0, 1.0]), [Label.VM, Label.NM])


@pytest.mark.parametrize(
    ("f", "b", "labels", "message"),
    [
        ([0.5], [0.5, 0.5], [Label.NM], "shape"),
        ([0.5, 0.5], [0.5, 0.5], [Label.NM], "labels"),
        ([0.5, 0.5], [0.5, 0.5], [Label.NM, Label.NM], "other label"),
        ([0.5, 1.5], [0.5, 0.5], [Label.VM, Label.NM], r"\[0, 1\]"),
        ([0.5, np.nan], [0.5, np.nan], [Label.VM, Label.NM], "no candidate"),
    ],
)
def test_wrong_rows_are_refused(f: list[float], b: list[float], labels: list[Label], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _calibrate(np.array(f), np.array(b), labels)


@pytest.fixture
def calibration() -> Calibration:
    return _calibrate(*_rows(0, 0.05, COUNTS))


def test_json_round_trip(calibration: Calibration, tmp_path: Path) -> None:
    path = str(tmp_path / "calibration.json")
    calibration.save(path)
    assert Calibration.load(path) == calibration


@pytest.mark.parametrize("change", [{"format": 1}, {"extra": 1}, {"canvas": "wide"}, {"macro_f1": None}])
def test_a_file_that_is_no_calibration_is_named(
    calibration: Calibration, tmp_path: Path, change: dict[str, object]
) -> None:
    path = str(tmp_path / "calibration.json")
    calibration.save(path)
    storage.write_json(path, {**storage.read_json(path), **change})
    with pytest.raises(InputError, match=r"calibration\.json: is not a calibration"):
        Calibration.load(path)


def test_thresholds_go_into_a_configuration_of_the_same_canvas(calibration: Calibration) -> None:
    config = calibration.apply(CONFIG)
    assert config.foreground_threshold == calibration.foreground_threshold
    assert config.background_threshold == calibration.background_threshold
    assert "world 7" in config.threshold_source
    with pytest.raises(ConfigError, match="canvas 176 are not valid"):
        calibration.apply(MetricConfig(canvas=512))


@pytest.mark.parametrize("events", [0, 1, 3])
def test_the_bound_is_held_with_confidence(events: int) -> None:
    """If the bound were the rate, so few false positives among 200 would be seen in 5 % of all samples."""
    from scipy.stats import binom

    f = np.concatenate([np.full(20, 0.9), np.full(200, 0.2)])
    f[20 : 20 + events] = 0.95
    labels = [Label.FM] * 20 + [Label.NM] * 200
    found = calibrate(
        f, np.full(220, 0.1), labels, config=CONFIG, source="w", models=MODELS, max_false_positive_rate=0.05
    )
    assert found.confidence == 0.95
    assert found.false_positive_rate == events / 200
    assert binom.cdf(events, 200, found.false_positive_bound) == pytest.approx(0.05, abs=1e-6)
    assert found.false_positive_bound <= 0.05


def test_few_rows_cannot_promise_a_low_rate() -> None:
    f, b, labels = _rows(0, 0.02, COUNTS)
    with pytest.raises(MemscanError, match="60 NM rows"):
        calibrate(f, b, labels, config=CONFIG, source="w", models=MODELS, max_false_positive_rate=0.01)


def test_probability_rises_through_the_border_between_copies_and_others(calibration: Calibration) -> None:
    """Scores are drawn around .4 and .8 with one spread, so the border lies half-way."""
    assert calibration.probability("foreground", 0.6) == pytest.approx(0.5, abs=0.25)
    values = [calibration.probability("foreground", score) for score in (0.3, 0.5, 0.7, 0.9)]
    assert values == sorted(values)
    assert values[0] < 0.05
    assert values[-1] > 0.95
