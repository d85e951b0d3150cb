"""This package is the reference index, which finds the training images that resemble a generation, and returns them.

An index is a folder of shards and a manifest. Each shard has one FAISS index per region, and the images and masks by
row. The manifest names the models, the version and the hash of every file. `write_index` makes an index, and
`ReferenceIndex.open` verifies and reads it.
"""

from memscan.index.manifest import Manifest
from memscan.index.references import Reference
from memscan.index.search import Hit, nearest_whole
from memscan.index.store import ReferenceIndex, write_index

__all__ = ["Hit", "Manifest", "Reference", "ReferenceIndex", "nearest_whole", "write_index"]
