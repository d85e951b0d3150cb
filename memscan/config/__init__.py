"""The census configuration: one file describes a run completely; the command line only picks and overrides.

Written as YAML, checked by pydantic (unknown keys are refused with the nearest valid key named), hashed into a
fingerprint that names the run's content. Two runs with one fingerprint are comparable; a run folder never mixes two.

Its sections by subject: `inputs` (captions, reference images), `models` (generator, segmenter, embedder),
`measurement` (metric, verdict, clusters), `screening` (screen, signals), `resources`; `census` puts them together and
has the fingerprint. `reading` makes one of them from YAML and overrides; `reference` describes every key.
"""

from memscan.config.base import Section
from memscan.config.census import CensusConfig
from memscan.config.inputs import IndexConfig, PromptsConfig
from memscan.config.measurement import (
    FILLED,
    ClustersConfig,
    MetricConfig,
    VerdictConfig,
    shipped_calibration,
    shipped_rate,
    shipped_weights_path,
)
from memscan.config.models import EmbedderConfig, GeneratorConfig, InversionConfig, LoraConfig, SegmenterConfig
from memscan.config.reading import load_config, parse_config, parse_metric, parse_section, read_yaml
from memscan.config.resources import PROBED_IMAGES, ResourcesConfig
from memscan.config.screening import ScreenConfig, SignalsConfig

__all__ = [
    "FILLED",
    "PROBED_IMAGES",
    "CensusConfig",
    "ClustersConfig",
    "EmbedderConfig",
    "GeneratorConfig",
    "IndexConfig",
    "InversionConfig",
    "LoraConfig",
    "MetricConfig",
    "PromptsConfig",
    "ResourcesConfig",
    "ScreenConfig",
    "Section",
    "SegmenterConfig",
    "SignalsConfig",
    "VerdictConfig",
    "load_config",
    "parse_config",
    "parse_metric",
    "parse_section",
    "read_yaml",
    "shipped_calibration",
    "shipped_rate",
    "shipped_weights_path",
]
