"""This package is the census configuration.

One file describes a run completely, and the command line only overrides keys of it.

The file is written in YAML and checked by pydantic. An unknown key is refused, and the message names the most similar
valid key. A hash of the content is the run's fingerprint. Two runs with the same fingerprint are comparable, and a run
folder never mixes two fingerprints.

The modules follow the subjects: `inputs` has captions and reference images, `models` has generator, segmenter and
embedder, `measurement` has metric, verdict and clusters, `screening` has screen and signals, and `resources` has
resources. `census` combines them and computes the fingerprint. `reading` makes a configuration from YAML and
overrides, and `reference` describes every key.
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
