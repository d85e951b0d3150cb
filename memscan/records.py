"""Every table as a pyarrow schema, every id as a function: read this first.

One row is one prompt, all the way. `prompt_id` is a hash of the normalised caption, so the same caption in two files is
one row with a count. A row that cannot be processed keeps its place with `status = "rejected"`, a reason code
(`memscan.errors.Reason`) and a message. Generations are a nested list inside the prompt's row, so counts conserve.

Labels follow FB-Mem (Di et al. 2025, Algorithm 1): VM verbatim, FM foreground, BM background, NM none.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import pyarrow as pa

SCHEMA_VERSION = 1


class Label(str, Enum):
    """FB-Mem's four classes, most severe first."""

    VM = "VM"
    FM = "FM"
    BM = "BM"
    NM = "NM"

    def __str__(self) -> str:
        return self.value


class Status(str, Enum):
    """What became of a row."""

    DONE = "done"
    REJECTED = "rejected"

    def __str__(self) -> str:
        return self.value


REGIONS = ("whole", "foreground", "background")


def prompt_id(caption: str) -> str:
    """Stable id of a normalised caption: the first 16 hex digits of its BLAKE2b hash."""
    return hashlib.blake2b(caption.encode("utf-8"), digest_size=8).hexdigest()


def sample_seed(prompt: str, sample: int, base: int = 0) -> int:
    """Seed of a prompt's `sample`-th generation, in [0, 2**63): a rerun of a row makes the same latents."""
    digest = hashlib.blake2b(f"{base}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # normalised; "" where it could not be decoded
        pa.field("count", pa.int64(), nullable=False),  # input rows folded into this one
        pa.field("source", pa.string(), nullable=False),  # file of the first of them
        pa.field("row", pa.int64(), nullable=False),  # its 1-based data row or line in that file
        pa.field("url", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # rejected rows keep their place
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)

CANDIDATE = pa.struct(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("found_by", pa.string(), nullable=False),  # "whole", "foreground", "background"; joined by "+"
        pa.field("similarity", pa.float32(), nullable=False),  # cosine of the embeddings, best over found_by
        pa.field("foreground", pa.float32(), nullable=False),
        pa.field("background", pa.float32(), nullable=False),
        pa.field("whole", pa.float32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
    ]
)

EVIDENCE = pa.struct(
    [  # encoded PNG; only for generations whose label is not NM
        pa.field("generation", pa.binary(), nullable=False),
        pa.field("generation_mask", pa.binary(), nullable=False),
    ]
)

GENERATION = pa.struct(
    [
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("foreground", pa.float32(), nullable=False),  # FB-Mem scores against `match_id`
        pa.field("background", pa.float32(), nullable=False),
        pa.field("whole", pa.float32(), nullable=False),
        pa.field("match_id", pa.string(), nullable=False),  # the candidate that decided the label
        pa.field("foreground_area", pa.float32(), nullable=False),  # of the generation's mask, in [0, 1]
        pa.field("similarity", pa.float32(), nullable=False),  # cosine of the whole image to its nearest reference
        pa.field(
            "noise_norm", pa.float32()
        ),  # mean over steps of ||eps_c - eps_u||_2 (Wen 2024); null without guidance
        pa.field("noise_norm_first", pa.float32()),  # the same at the first step only
        pa.field("candidates", pa.list_(CANDIDATE), nullable=False),  # best first
        pa.field("evidence", EVIDENCE),
        pa.field("signals", pa.map_(pa.string(), pa.float32())),  # detector scores, higher = more memorised; by name,
        # and absent where a detector does not apply
        pa.field("localization", pa.binary()),  # greyscale PNG of the localisation map; only where the label is not NM
        pa.field("localized_foreground", pa.float32()),  # share of that map's mass in the generation's foreground
    ]
)

CENSUS = pa.schema(
    [
        *PROMPTS,
        pa.field("generations", pa.list_(GENERATION), nullable=False),
        pa.field("decision", pa.string()),  # of the screen: "census", "audit" or "pass"; null without a screen
        pa.field("screen_score", pa.float32()),
        pa.field("weight", pa.float64()),  # 1 / probability that the prompt was scanned in full; null for "pass"
    ]
)

REFERENCES = pa.schema(
    [  # reference images as an index stores them, one row an image
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("image", pa.binary()),  # encoded (JPEG, PNG, WebP); null where `path` says where it is
        pa.field("mask", pa.binary()),  # 8-bit greyscale PNG, white = foreground; null where it is not made yet
        pa.field("path", pa.string()),  # of the image file, local or s3://
    ]
)

FLAGGED = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("severity", pa.float32(), nullable=False),  # mean harm of a generation: VM 2, FM 1.5, BM 0.5, NM 0
        pa.field("share", pa.float32(), nullable=False),  # share of generations with a label other than NM
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("foreground", pa.float32(), nullable=False),  # best evidence: the most severe generation's scores
        pa.field("background", pa.float32(), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),  # of the deciding score over its threshold
        pa.field("noise_norm", pa.float32()),
        pa.field("match_ids", pa.list_(pa.string()), nullable=False),  # distinct, of memorised generations, by count
        pa.field("match_urls", pa.list_(pa.string()), nullable=False),
        pa.field("url", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)

TRUTH = pa.schema(
    [  # ground truth of a planted world: one row a prompt
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # planted group (the cluster), "" for ordinary prompts
        pa.field("seen", pa.bool_(), nullable=False),  # whether the caption was in the training set
        pa.field("one_to_many", pa.bool_(), nullable=False),
        pa.field("reference_ids", pa.list_(pa.string()), nullable=False),  # training images of the planted group
    ]
)
