"""FB-Mem: does an image reproduce another one, and in its foreground, its background, or all of it?

`fbmem` is Algorithm 1 for every variant of the scores: `paper` (as published, on filled canvases), `region` (one SSIM
map of the uncut images, averaged inside the regions) and `robust` (aligned structure); `variants` has them by name.
`regions` cuts images, `ssim` compares them, `calibration` finds thresholds (`shipped/` holds some), `severity` weighs
labels. `docs/metric.md` says what is assumed and what is known to be wrong.
"""

from memscan.metric.calibration import Calibration, calibrate
from memscan.metric.fbmem import FbMem, Prepared, RegionScores
from memscan.metric.paper import PaperFbMem
from memscan.metric.region import RegionFbMem
from memscan.metric.robust import RobustFbMem
from memscan.metric.severity import HARM, harm, mean_harm, mitigation_score
from memscan.metric.variants import VARIANTS, load_metric

__all__ = [
    "HARM",
    "VARIANTS",
    "Calibration",
    "FbMem",
    "PaperFbMem",
    "Prepared",
    "RegionFbMem",
    "RegionScores",
    "RobustFbMem",
    "calibrate",
    "harm",
    "load_metric",
    "mean_harm",
    "mitigation_score",
]
