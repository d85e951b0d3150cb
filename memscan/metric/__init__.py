"""FB-Mem: does an image reproduce another one, and in its foreground, its background, or all of it?

`regions` cuts images, `ssim` compares them, `fbmem` is Algorithm 1,
`region` its variant with region means, `severity` weighs the labels, `calibration` finds
the thresholds. `docs/metric.md` says what is assumed and what is known to be wrong.
"""

from memscan.metric.calibration import Calibration, calibrate
from memscan.metric.fbmem import FbMem, Prepared, RegionScores
from memscan.metric.region import RegionFbMem, load_metric
from memscan.metric.severity import HARM, harm, mean_harm, mitigation_score

__all__ = [
    "HARM",
    "Calibration",
    "FbMem",
    "Prepared",
    "RegionFbMem",
    "RegionScores",
    "calibrate",
    "harm",
    "load_metric",
    "mean_harm",
    "mitigation_score",
]
