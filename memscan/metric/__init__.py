"""This package is FB-Mem. It decides whether an image reproduces another one, and in which part of the image.

`fbmem` is Algorithm 1 for every variant of the scores: `paper` (as published, on filled canvases), `release` (as the
authors' scripts compute it), `region` (one SSIM map of the uncut images, averaged inside the regions), `robust`
(aligned structure) and `combined` (the last two weighed by a model, `combination`, under the reference's mask);
`variants` has them by name. `labelled` computes figures on labelled pairs.
`decision` turns scores into labels and margins, without torch. `regions` cuts images, `ssim` compares them,
`calibration` finds thresholds (`shipped/` holds some), `comparison` explains one pair. `docs/metric.md` says what is
assumed and what is known to be wrong.

The names below are loaded when they are first used. `decision` alone imports neither torch nor scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memscan.metric.calibration import Calibration, calibrate
    from memscan.metric.combined import CombinedFbMem
    from memscan.metric.fbmem import FbMem, Prepared, RegionScores
    from memscan.metric.paper import PaperFbMem
    from memscan.metric.region import RegionFbMem
    from memscan.metric.release import ReleaseFbMem
    from memscan.metric.robust import RobustFbMem
    from memscan.metric.variants import VARIANTS, load_metric

_HOMES = {
    "Calibration": "calibration",
    "CombinedFbMem": "combined",
    "FbMem": "fbmem",
    "PaperFbMem": "paper",
    "Prepared": "fbmem",
    "RegionFbMem": "region",
    "RegionScores": "fbmem",
    "ReleaseFbMem": "release",
    "RobustFbMem": "robust",
    "VARIANTS": "variants",
    "calibrate": "calibration",
    "load_metric": "variants",
}

__all__ = [
    "VARIANTS",
    "Calibration",
    "CombinedFbMem",
    "FbMem",
    "PaperFbMem",
    "Prepared",
    "RegionFbMem",
    "RegionScores",
    "ReleaseFbMem",
    "RobustFbMem",
    "calibrate",
    "load_metric",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memscan.metric' has no attribute {name!r}")
    return getattr(import_module(f"memscan.metric.{_HOMES[name]}"), name)
