"""This module has the specifications of detectors that cost a scan nothing, by the names of their signals.

It does not import torch, because `reduce` needs it.

`sampled` and `memscan.models.hooks` compute them; similarities to the match come from the judging half.
"""

from __future__ import annotations

from memscan.detection.base import DetectorSpec, Need

NOISE_NORM = DetectorSpec("noise_norm", "Wen 2024, all steps", frozenset({Need.GUIDANCE}))
NOISE_NORM_FIRST = DetectorSpec("noise_norm_first", "Wen 2024, first step", frozenset({Need.GUIDANCE}))
ATTENTION_ENTROPY = DetectorSpec("attention_entropy", "Ren 2024, last ten steps", frozenset({Need.CROSS_ATTENTION}))
BRIGHT_ENDING = DetectorSpec("bright_ending", "Chen 2025", frozenset({Need.CROSS_ATTENTION, Need.GUIDANCE}))
TILED_L2 = DetectorSpec("tiled_l2", "Carlini 2023", frozenset({Need.SEVERAL_GENERATIONS}))
COPY = DetectorSpec("copy_similarity", "SSCD, Pizzi 2022", frozenset({Need.REFERENCES}))
SEMANTIC = DetectorSpec("semantic_similarity", "CLIP score, Radford 2021", frozenset({Need.REFERENCES, Need.MEANING}))
SAMPLED = (NOISE_NORM, NOISE_NORM_FIRST, ATTENTION_ENTROPY, BRIGHT_ENDING, TILED_L2, COPY, SEMANTIC)
