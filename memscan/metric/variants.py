"""This module gives the metric's variants by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memscan.config import MetricConfig
from memscan.metric.combined import CombinedFbMem
from memscan.metric.fbmem import FbMem
from memscan.metric.paper import PaperFbMem
from memscan.metric.region import RegionFbMem
from memscan.metric.release import ReleaseFbMem
from memscan.metric.robust import RobustFbMem

VARIANTS: dict[str, Callable[[MetricConfig, str | torch.device], FbMem[Any]]] = {
    "paper": PaperFbMem,
    "release": ReleaseFbMem,
    "region": RegionFbMem,
    "robust": RobustFbMem,
    "combined": CombinedFbMem,
}


def load_metric(config: MetricConfig, device: str | torch.device = "cpu") -> FbMem[Any]:
    """Return the metric that a configuration names."""
    return VARIANTS[config.variant](config, device)
