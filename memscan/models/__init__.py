"""This package has one adapter per role. Each is a batch function with a specification.

* `generator.Generator` turns captions and seeds into images, and computes signals while sampling (`hooks`).
* `segmenter.Segmenter` turns images into soft foreground masks.
* `embedder.Embedder` turns images into unit vectors of a copy-detection space.

Every adapter has a `specification.ModelSpec`, because the hash of its weights and its preprocessing are part of the
name of what it measures. This package imports none of the heavy libraries; its modules do.
"""

from __future__ import annotations

from memscan.models.specification import ModelSpec

__all__ = ["ModelSpec"]
