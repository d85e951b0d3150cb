"""Which of four layouts a source of references has, looked at without reading an image and without torch or Ray.

images       a folder of image files; a text file of the same name is the caption
parquet      Parquet files with encoded images
webdataset   tars of samples, as img2dataset writes them; its Parquet files beside them only repeat what is in them
embeddings   .npy files of vectors, and Parquet files with as many rows (clip-retrieval, LAION)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from memscan.errors import InputError
from memscan.io import storage

Kind = Literal["images", "parquet", "webdataset", "embeddings"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
_SUFFIXES = (".npy", ".tar", ".parquet", *IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Layout:
    """Files of a source, in the order of its references.

    Args:
        kind: of the layout.
        root: folder that the files are in.
        files: Parquet files, tars, image files, or .npy files.
        beside: of embeddings, the Parquet file that belongs to each .npy file.
    """

    kind: Kind
    root: str
    files: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def all_files(self) -> tuple[str, ...]:
        return (*self.files, *self.beside)

    def name(self, file: str) -> str:
        """Path of a file below the root."""
        return file.removeprefix(self.root)


def find_layout(path: str) -> Layout:
    """Look at a source.

    Raises:
        InputError: it is missing, holds nothing of the kind, or vectors without metadata.
    """
    if not storage.exists(path):
        raise InputError("no such file or folder", where=path, hint="see index.source")
    if not storage.is_dir(path):
        root = storage.join(path).rpartition("/")[0]
        return Layout("webdataset" if path.lower().endswith(".tar") else "parquet", f"{root}/" if root else "", (path,))
    root = storage.join(path) + "/"
    found: dict[str, list[str]] = {suffix: [] for suffix in _SUFFIXES}
    for file in storage.list_files(path, _SUFFIXES):
        found[next(suffix for suffix in _SUFFIXES if file.lower().endswith(suffix))].append(file)
    # clip-retrieval keeps vectors of the captions beside those of the images.
    vectors = [file for file in found[".npy"] if "text_emb" not in file.removeprefix(root)]
    if vectors and not found[".tar"]:
        return Layout("embeddings", root, tuple(vectors), _pair(vectors, found[".parquet"], path))
    if found[".tar"]:
        return Layout("webdataset", root, tuple(found[".tar"]))
    if found[".parquet"]:
        return Layout("parquet", root, tuple(found[".parquet"]))
    images = sorted(file for suffix in IMAGE_SUFFIXES for file in found[suffix])
    if not images:
        raise InputError("holds neither images, Parquet files, tars nor vectors (.npy)", where=path)
    return Layout("images", root, tuple(images))


def _pair(vectors: Sequence[str], tables: Sequence[str], path: str) -> tuple[str, ...]:
    """The Parquet file of each .npy file: by the number at the end of their names."""
    numbered = {_number(table): table for table in tables}
    missing = [file for file in vectors if _number(file) not in numbered]
    if missing or len(numbered) < len(tables):
        what = f"no Parquet file with the number of {missing[0]}" if missing else "two Parquet files have one number"
        raise InputError(what, where=path, hint="img_emb/img_emb_7.npy belongs to metadata/metadata_7.parquet")
    return tuple(numbered[_number(file)] for file in vectors)


def _number(file: str) -> str:
    digits = re.search(r"(\d+)$", file.rpartition(".")[0])
    return str(int(digits[1])) if digits else ""
