"""This module makes a reference index of some images in memory, without Ray.

For millions of images use `memscan index build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from memscan.config import CensusConfig
from memscan.errors import InputError, RowReject
from memscan.index.store import ReferenceIndex, write_index
from memscan.io.images import encode_png
from memscan.records import REFERENCES, REGIONS
from memscan.worker.detector import ImageLike, read_pixels
from memscan.worker.encoder import RegionEncoder


def index_images(
    folder: str | Path,
    images: Mapping[str, ImageLike],
    config: CensusConfig,
    *,
    captions: Mapping[str, str] | None = None,
    device: str = "cpu",
    encoder: RegionEncoder | None = None,
) -> ReferenceIndex:
    """Write an index of images that are available, and open it.

    Args:
        folder: local or s3://; an existing index is replaced.
        images: by their ids, in any form of `ImageLike`.
        config: its `segmenter`, `embedder` and `index` (factory, nprobe) are used.
        captions: of some of the images, by their ids.
        device: where segmenter and embedder run.
        encoder: loaded segmenter and embedder; by default they are loaded as configured.

    Raises:
        InputError: there are no images, or one of them cannot be read, segmented or embedded; its id is named.
        ModelError: segmenter or embedder cannot be loaded.
    """
    if not images:
        raise InputError("no reference images", where=str(folder))
    ready = encoder or RegionEncoder(config, device, threads=1)
    stored = [_encoded(name, image) for name, image in images.items()]
    rows, vectors = [], []
    for name, image, found in zip(images, stored, ready(stored), strict=True):
        if isinstance(found, RowReject):
            raise _unusable(name, found)
        mask, vectors_RD = found
        rows.append({"reference_id": name, "caption": (captions or {}).get(name), "image": image, "mask": mask})
        vectors.append(vectors_RD)
    vectors_NRD = np.stack(vectors)
    write_index(
        str(folder),
        pa.Table.from_pylist(rows, schema=REFERENCES),
        {region: np.ascontiguousarray(vectors_NRD[:, at]) for at, region in enumerate(REGIONS)},
        config.index.factory,
        config.index.nprobe,
        ready.embedder.spec,
        ready.segmenter.spec,
    )
    return ReferenceIndex.open(str(folder), ready.embedder.spec, nprobe=config.index.nprobe)


def _encoded(name: str, image: ImageLike) -> bytes:
    """Return an image as its file has it; pixels as PNG."""
    if isinstance(image, bytes):
        return image
    try:
        return encode_png(read_pixels(image)) if isinstance(image, np.ndarray) else Path(image).read_bytes()
    except RowReject as error:
        raise _unusable(name, error) from error
    except OSError as error:
        raise InputError(f"image {name!r} cannot be read ({error.strerror or error})", where=str(image)) from error


def _unusable(name: str, reject: RowReject) -> InputError:
    return InputError(f"image {name!r}: {reject.message} ({reject.reason.value})", hint="leave it out")
