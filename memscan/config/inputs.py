"""This module configures the inputs other than models: the captions, and the reference images with their index."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from memscan.config.base import Section


class PromptsConfig(Section):
    """This section says where the captions come from."""

    paths: list[str] = Field(
        min_length=1,
        description="These files hold the captions (CSV, TSV, JSON, JSON Lines, TXT or Parquet, compressed or not). A "
        "path may also be a folder of such files, or a pattern such as part-{00000..00127}.csv.gz. Each path is local "
        "or s3://.",
    )
    caption_column: str | int | None = Field(
        None,
        description="This column holds the caption. It is given by its name or by its number (from 1 on). If it is "
        "not given, memscan looks for a column with one of the usual names.",
    )
    url_column: str | int | None = Field(
        None,
        description="This column holds the image URL, which is copied into the results. It is given by its name or by "
        "its number (from 1 on).",
    )
    header: bool = Field(
        True,
        description="This key says whether the first line of a CSV or TSV names its columns. If it is false, "
        "caption_column must be a number.",
    )
    max_chars: int = Field(
        4096,
        ge=1,
        description="A caption with more characters than this becomes a rejected row with the reason caption_too_long.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="The scan takes only this number of distinct prompts, starting with the first. If it is not "
        "given, all prompts are taken.",
    )


class IndexConfig(Section):
    """This section names the reference images and their index. At least one of `path` and `source` must be given."""

    path: str | None = Field(
        None,
        description="This is the folder of the index, local or s3://. If it holds an index, that index is used; "
        "otherwise an index is built there from `source`. If this key is not given, the index is built inside the run "
        "folder.",
    )
    source: str | None = Field(
        None,
        description="The index is built from these reference images: a folder of images, Parquet with encoded images, "
        "WebDataset tar files, or a folder of ready embeddings.",
    )
    factory: str = Field(
        "auto",
        description='This is the FAISS factory string of the index, such as "IVF256,Flat". With "auto", the number of '
        "references and the memory decide the type.",
    )
    nprobe: int | None = Field(
        None,
        ge=1,
        description="A search looks into this number of inverted lists. More lists find more candidates and take "
        "longer. If it is not given, the number that was stored when the index was built is used.",
    )
    memory: str | None = Field(
        None,
        description='One node has this amount of memory for the index, for example "8GB". Only the choice of '
        '`factory: auto` uses this key. If it is not given, "auto" uses only the number of references.',
    )
    shard_rows: int = Field(
        524_288,
        ge=1,
        description="One shard of the index holds about this number of references, because whole chunks of the source "
        "go into one shard.",
    )
    images: Literal["copy", "path"] = Field(
        "copy",
        description='"copy" stores the encoded images inside the index. "path" stores only the paths of images that '
        "are files; these files must then stay where they are.",
    )
    image_root: str | None = Field(
        None,
        description="The metadata of ready embeddings name images in this folder. A path that leads out of the folder "
        "is not followed. If it is not given, it is the folder of the source.",
    )
    id_column: str | None = Field(
        None,
        description="This column of the source's tables holds the ids of the images. If it is not given, memscan "
        "looks for a column with one of the usual names; if there is none, an id is made of the file's name and the "
        "number of the row.",
    )
    image_column: str | None = Field(
        None,
        description="This column holds the encoded images. If it is not given, memscan looks for a column with one of "
        "the usual names.",
    )
    caption_column: str | None = Field(
        None,
        description="This column holds the captions of the images. If it is not given, memscan looks for a column "
        "with one of the usual names.",
    )
    url_column: str | None = Field(
        None,
        description="This column holds the addresses of the images. If it is not given, memscan looks for a column "
        "with one of the usual names.",
    )
    id_prefix: str | None = Field(
        None,
        description="All ids of the source begin with this text. If it is not given, there is no such text; but when "
        "references are added to an index, ids that are made of paths begin with the name of the source's folder.",
    )
    top_k: int = Field(
        5,
        ge=1,
        description="Whole image, foreground and background each search for this number of candidates. Every distinct "
        "candidate is then compared with the metric.",
    )

    @model_validator(mode="after")
    def _one_of(self) -> IndexConfig:
        if self.path is None and self.source is None:
            raise ValueError("give path (a built index) or source (the reference images)")
        return self
