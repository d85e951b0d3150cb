"""This module finds out what a source of references holds: images, tables, tars, or vectors with a table.

It needs neither torch nor Ray.

images       image files; their captions are beside them (.txt, .json) or in their folder's metadata.jsonl|csv|parquet
parquet      Parquet files, or the Arrow files that `save_to_disk` writes, with encoded images
webdataset   tars of samples, as img2dataset writes them; its Parquet files beside them only repeat what is in them
embeddings   .npy files of vectors, and Parquet files with as many rows (clip-retrieval, LAION)
mixed        several of the first three

Files are recognised by their names if these say what they are, and otherwise by their first bytes. Files that are not
taken are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from memscan.errors import InputError
from memscan.io import storage
from memscan.io.compressed import without_suffix
from memscan.io.listing import NotTaken, image_formats
from memscan.io.patterns import common_folder, expand
from memscan.sources.tables import has_images

Kind = Literal["images", "parquet", "webdataset", "embeddings", "mixed"]
FileKind = Literal["image", "table", "tar", "vectors"]
IMAGE_SUFFIXES = (
    *(
        ".jpg",
        ".jpeg",
        ".jfif",
        ".jpe",
        ".jpg_large",
        ".png",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
    ),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
TABLE_SUFFIXES = (".parquet", ".arrow")
TEXT, JSON = 1, 2  # what stands beside an image, in bits
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BESIDE = {".txt": TEXT, ".json": JSON}
_KINDS: dict[FileKind, Kind] = {"image": "images", "table": "parquet", "tar": "webdataset", "vectors": "embeddings"}


@dataclass(frozen=True)
class Layout:
    """These are the files of a source, in the order of its references.

    Args:
        root: folder that the files are in, with a slash at its end.
        files: Parquet files, tars, image files, or .npy files.
        kinds: what each of them is.
        beside: of embeddings, the Parquet file that belongs to each .npy file.
        captions: by file, what is beside an image: `TEXT`, `JSON`, both or nothing.
        metadata: files with captions for a folder of images.
        not_taken: all other files.
    """

    root: str
    files: tuple[str, ...]
    kinds: tuple[FileKind, ...]
    beside: tuple[str, ...] = ()
    captions: bytes = b""
    metadata: tuple[str, ...] = ()
    not_taken: tuple[NotTaken, ...] = ()

    @cached_property
    def kind(self) -> Kind:
        """This is the kind of all files, or "mixed"."""
        first = self.kinds[0]
        return _KINDS[first] if all(kind == first for kind in self.kinds) else "mixed"

    @property
    def all_files(self) -> tuple[str, ...]:
        return (*self.files, *self.beside)

    def name(self, file: str) -> str:
        """Return the path of a file below the root."""
        return file.removeprefix(self.root)


def find_layout(path: str) -> Layout:
    """Examine a source: a file, a folder, or a pattern of them.

    Raises:
        InputError: it is missing, holds nothing of the kind, or vectors without metadata.
    """
    try:
        places = expand(path)
    except InputError as error:
        raise InputError(error.what, where=error.where, hint=error.hint or "see index.source") from error
    folders = [place for place in places if storage.is_dir(place)]
    if len(places) == 1:
        root = storage.join(places[0]) + "/" if folders else common_folder(places)
    else:
        root = common_folder([storage.join(place, "x") if place in folders else place for place in places])
    named = {place for place in places if place not in folders}
    files: dict[str, None] = {}
    for place in places:
        found = storage.list_files(place, ("",), hidden=True) if place in folders else [place]
        files.update(dict.fromkeys(found))
    return _sorted_out(list(files), named, root, path)


def _sorted_out(files: list[str], named: set[str], root: str, path: str) -> Layout:
    not_taken: list[NotTaken] = []
    tars, tables, vectors, images, unknown = [], [], [], [], []
    beside: dict[str, int] = {}
    metadata: list[str] = []
    for file in files:
        name = file.rpartition("/")[2]
        lower = name.lower()
        ending = f".{lower.rpartition('.')[2]}" if "." in lower else ""
        if name.startswith(".") and file not in named:
            not_taken.append(NotTaken(file, "hidden"))
        elif without_suffix(lower).endswith(".tar") or ending == ".tgz":
            tars.append(file)
        elif ending == ".npy":
            # clip-retrieval keeps vectors of the captions beside those of the images.
            kept = "text_emb" not in file.removeprefix(root)
            vectors.append(file) if kept else not_taken.append(NotTaken(file, "vectors of captions"))
        elif lower in METADATA:
            metadata.append(file)
        elif ending in TABLE_SUFFIXES:
            cache = ending == ".arrow" and name.startswith("cache-")
            not_taken.append(NotTaken(file, "a cache of datasets")) if cache else tables.append(file)
        elif ending in _BESIDE and file not in named:
            stem = file[: -len(ending)]
            beside[stem] = beside.get(stem, 0) | _BESIDE[ending]
            unknown.append(file)
        elif ending in IMAGE_SUFFIXES:
            images.append(file)
        else:
            unknown.append(file)
    if vectors and not tars:
        given: list[FileKind] = ["vectors" for _ in vectors]
        return Layout(root, tuple(vectors), tuple(given), _pair(vectors, tables + metadata, path))
    stems = {_stem(file) for file in images}
    waiting = [file for file in unknown if not (file.lower().endswith(tuple(_BESIDE)) and _stem(file) in stems)]
    for file, kind in zip(waiting, image_formats(waiting), strict=True):
        if kind:
            images.append(file)
        else:
            not_taken.append(NotTaken(file, "not an image" if kind is None else "cannot be read"))
    if not images:
        tables += metadata
        metadata = []
    taken = _real_tables(tables, tars, images, named, not_taken)
    # Vectors beside tars are what a model made of them; the tars have the images.
    not_taken += [NotTaken(file, "vectors beside tars") for file in vectors]
    kinds: dict[str, FileKind] = {
        **dict.fromkeys(tars, "tar"),
        **dict.fromkeys(taken, "table"),
        **dict.fromkeys(images, "image"),
    }
    ordered = sorted(kinds) if len(named) < 2 else [file for file in files if file in kinds]
    if not ordered:
        raise InputError(
            "holds neither images, Parquet files, tars nor vectors (.npy)", where=path, hint=_first(not_taken)
        )
    captions = bytes(beside.get(_stem(file), 0) if kinds[file] == "image" else 0 for file in ordered)
    return Layout(
        root,
        tuple(ordered),
        tuple(kinds[file] for file in ordered),
        (),
        captions if any(captions) else b"",
        tuple(metadata),
        tuple(not_taken),
    )


def _real_tables(
    tables: list[str], tars: list[str], images: list[str], named: set[str], not_taken: list[NotTaken]
) -> list[str]:
    """Return the tables that hold images, or else all tables, so that a message can say what they lack."""
    if not (tars or images):
        return tables
    folders = {file.rpartition("/")[0] for file in images}
    stems = {without_suffix(file)[:-4] for file in tars}
    taken = []
    for file in tables:
        stem = _stem(file)
        if stem in stems or stem in folders:
            not_taken.append(NotTaken(file, "metadata of a tar or folder beside it"))
        elif file in named or has_images(file):
            taken.append(file)
        else:
            not_taken.append(NotTaken(file, "a table without images"))
    return taken


def _stem(file: str) -> str:
    folder, slash, name = file.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


def _first(entries: Sequence[NotTaken]) -> str | None:
    return f"its first file is {entries[0].path}: {entries[0].why}" if entries else None


def _pair(vectors: Sequence[str], tables: Sequence[str], path: str) -> tuple[str, ...]:
    """Return the Parquet file of each .npy file: by the number at the end of their names."""
    numbered = {_number(table): table for table in tables}
    missing = [file for file in vectors if _number(file) not in numbered]
    if missing or len(numbered) < len(tables):
        what = f"no Parquet file with the number of {missing[0]}" if missing else "two Parquet files have one number"
        raise InputError(what, where=path, hint="img_emb/img_emb_7.npy belongs to metadata/metadata_7.parquet")
    return tuple(numbered[_number(file)] for file in vectors)


def _number(file: str) -> str:
    digits = re.search(r"(\d+)$", file.rpartition(".")[0])
    return str(int(digits[1])) if digits else ""
