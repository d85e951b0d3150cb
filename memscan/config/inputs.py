"""What goes into a census besides models: the captions, and the reference images with their index."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from memscan.config.base import Section


class PromptsConfig(Section):
    """Where the captions come from."""

    paths: list[str] = Field(
        min_length=1,
        description="The files with captions (CSV, TSV, JSON, JSON Lines, TXT or Parquet, as they are or compressed), "
        "folders of such files, or patterns such as part-{00000..00127}.csv.gz; each path is local or s3://.",
    )
    caption_column: str | int | None = Field(
        None,
        description="The column that holds the caption, by its name or its number (from 1 on). When it is not given, "
        "the column is found by its usual names.",
    )
    url_column: str | int | None = Field(
        None,
        description="The column that holds the image URL, which is carried into the results, by its name or its "
        "number (from 1 on).",
    )
    header: bool = Field(
        True,
        description="Whether the first line of a CSV or TSV names its columns. When it is false, caption_column is a "
        "number.",
    )
    max_chars: int = Field(
        4096,
        ge=1,
        description="The longest caption that is scanned, in characters; a longer one becomes a rejected row with the "
        "reason caption_too_long.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="The number of distinct prompts that are taken, from the first one on. When it is not given, all "
        "prompts are taken.",
    )


class IndexConfig(Section):
    """The reference images and their index. At least one of `path` and `source` must be given."""

    path: str | None = Field(
        None,
        description="The folder of the index, local or s3://. An index that is there is used; otherwise it is built "
        "there from `source`. When it is not given, the index is built inside the run folder.",
    )
    source: str | None = Field(
        None,
        description="The reference images that an index is built from: a folder of images, Parquet with encoded "
        "images, WebDataset tar files, or a folder of ready embeddings.",
    )
    factory: str = Field(
        "auto",
        description='The FAISS factory string of the index, such as "IVF256,Flat". With "auto" the type is chosen by '
        "the number of references and the memory.",
    )
    nprobe: int | None = Field(
        None,
        ge=1,
        description="The number of inverted lists that a search looks into. More lists find more and take longer. "
        "When it is not given, the number that was stored when the index was built is used.",
    )
    memory: str | None = Field(
        None,
        description='The memory that one node has for the index, for example "8GB"; only the choice of '
        '`factory: auto` uses it. When it is not given, "auto" goes by the number of references alone.',
    )
    shard_rows: int = Field(
        524_288,
        ge=1,
        description="The number of references in one shard of the index, as far as whole chunks of the source allow.",
    )
    images: Literal["copy", "path"] = Field(
        "copy",
        description='"copy" stores the encoded images inside the index; "path" stores only the paths of those that '
        "are files, which must then stay where they are.",
    )
    image_root: str | None = Field(
        None,
        description="The folder of the images that the metadata of ready embeddings name; a path that leads out of it "
        "is not followed. When it is not given, it is the folder of the source.",
    )
    id_column: str | None = Field(
        None,
        description="The column of the source's tables that holds the ids of the images. When it is not given, it is "
        "found by its usual names, and where there is none, an id is the file's name and the number of the row.",
    )
    image_column: str | None = Field(
        None,
        description="The column that holds the encoded images. When it is not given, it is found by its usual names.",
    )
    caption_column: str | None = Field(
        None,
        description="The column that holds the captions of the images. When it is not given, it is found by its usual "
        "names.",
    )
    url_column: str | None = Field(
        None,
        description="The column that holds the addresses of the images. When it is not given, it is found by its usual "
        "names.",
    )
    id_prefix: str | None = Field(
        None,
        description="The text that all ids of the source begin with. When it is not given, there is none; in an "
        "addition to an index, ids that are made of paths then begin with the name of the source's folder.",
    )
    top_k: int = Field(
        5,
        ge=1,
        description="The number of candidates that are searched by each of whole image, foreground and background; "
        "every distinct one is then compared with the metric.",
    )

    @model_validator(mode="after")
    def _one_of(self) -> IndexConfig:
        if self.path is None and self.source is None:
            raise ValueError("give path (a built index) or source (the reference images)")
        return self
