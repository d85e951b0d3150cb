"""This module opens and checks the references that a configuration names, before any expensive work starts."""

from __future__ import annotations

from memscan.config import IndexConfig
from memscan.sources.reading import Source, open_source


def configured_source(settings: IndexConfig, *, appended: bool = False) -> Source:
    """Return the references of `index.source`.

    Args:
        appended: whether they are added to an index: ids that are made of paths or row numbers then begin with the
            name of the source's folder, since those of two data sets are often the same.

    Raises:
        InputError: as `open_source`.
    """
    columns = {
        "reference_id": settings.id_column,
        "image": settings.image_column,
        "caption": settings.caption_column,
        "url": settings.url_column,
    }
    source = open_source(
        str(settings.source),
        copies=settings.images == "copy",
        image_root=settings.image_root,
        columns={ours: name for ours, name in columns.items() if name is not None},
        prefix=settings.id_prefix or "",
    )
    if appended and settings.id_prefix is None:
        source = source.prefixed(f"{source.layout.root.rstrip('/').rpartition('/')[2]}/")
    return source
