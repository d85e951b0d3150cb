"""This package has one adapter per role. Each is a batch function with a specification.

* `generator.Generator`: captions and seeds to images, and the signals taken on the way (`hooks`);
* `segmenter.Segmenter`: images to soft foreground masks;
* `embedder.Embedder`: images to unit vectors of a copy-detection space.

Every adapter carries a `specification.ModelSpec`: the hash of its weights and its preprocessing belong to the name of
what it measures. Importing this package imports none of the heavy libraries; the modules do.
"""

from __future__ import annotations

from memscan.models.specification import ModelSpec

__all__ = ["ModelSpec"]
