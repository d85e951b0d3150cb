"""What is remembered of pictures that belong to several pairs."""

from __future__ import annotations

import numpy as np

from memscan.config import MetricConfig
from memscan.metric.comparison import Picture, Preparations, compare_pictures
from memscan.metric.variants import load_metric


def test_a_picture_of_several_pairs_is_prepared_once_and_scores_the_same(rng: np.random.Generator) -> None:
    metric = load_metric(MetricConfig(variant="region", canvas=128))
    reference, *others = (
        Picture(f"{at}.png", rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), np.eye(40, 50, dtype=np.float32))
        for at in range(4)
    )
    masked = Picture(reference.name, reference.image_HWC, 1 - np.eye(40, 50, dtype=np.float32))
    made: list[str] = []
    prepare = Preparations(metric, kept=2)
    whole = metric.prepare
    metric.prepare = lambda *picture: made.append("") or whole(*picture)  # type: ignore[func-returns-value, method-assign]
    remembered = [compare_pictures(metric, other, reference, prepare=prepare).scores for other in others]
    assert len(made) == 4
    assert prepare(masked) is not prepare(reference)
    assert remembered == [compare_pictures(metric, other, reference).scores for other in others]
