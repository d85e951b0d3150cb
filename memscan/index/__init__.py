"""This package is the reference index, which finds the training images that resemble a generation, and returns them.

A folder of shards, each with one FAISS index a region and the images and masks by row, and a manifest that names the
models, the version and the hash of every file. `write_index` makes one, `ReferenceIndex.open` verifies and reads it.
"""

from memscan.index.manifest import Manifest
from memscan.index.references import Reference
from memscan.index.search import Hit, nearest_whole
from memscan.index.store import ReferenceIndex, write_index

__all__ = ["Hit", "Manifest", "Reference", "ReferenceIndex", "nearest_whole", "write_index"]
