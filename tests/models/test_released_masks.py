"""Masks of the presets against stored outputs of rembg's own sessions, over the same small network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.parity.cases import mask_image, small_network
from benchmarks.parity.table import stored
from memscan.config import SegmenterConfig
from memscan.models.segmenter import load_segmenter


@pytest.mark.parametrize("row", stored("rembg")["values"], ids=lambda row: row["preset"])
def test_a_presets_mask_is_rembgs_to_one_step_of_8_bits(row: dict[str, Any], tmp_path: Path) -> None:
    config = SegmenterConfig(path=str(tmp_path / "m.onnx"), preset=row["preset"])
    Path(config.path).write_bytes(small_network(logits=row["preset"] == "birefnet", side=config.size))
    (mask_HW,) = load_segmenter(config).segment([mask_image()])
    expected_HW = np.array(row["mask"], np.float32)
    assert np.ptp(expected_HW) > 200
    np.testing.assert_allclose(mask_HW * 255, expected_HW, atol=1.001)
    assert (mask_HW * 255 == expected_HW).mean() > 0.98
