"""This module declares every table as a pyarrow schema and every id as a function. Read it first.

One row is one prompt, all the way. `prompt_id` is a hash of the normalised caption, so the same caption in two files is
one row with a count. A row that cannot be processed keeps its place with `status = "rejected"`, a reason code
(`memscan.errors.Reason`) and a message. Generations are a nested list inside the prompt's row, so counts conserve.

Labels follow FB-Mem (Di et al. 2025, Algorithm 1): VM verbatim, FM foreground, BM background, NM none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1


class Label(str, Enum):
    """These are FB-Mem's four classes, the most severe first."""

    VM = "VM"
    FM = "FM"
    BM = "BM"
    NM = "NM"

    def __str__(self) -> str:
        return self.value


LABELS = [label.value for label in Label]  # most severe first: ties go to the earlier
MEMORISED = [label for label in LABELS if label != Label.NM.value]
ANY = "memorised"  # the union of VM, FM and BM


class Status(str, Enum):
    """This says whether a row was processed or rejected."""

    DONE = "done"
    REJECTED = "rejected"

    def __str__(self) -> str:
        return self.value


REGIONS = ("whole", "foreground", "background")


def prompt_id(caption: str) -> str:
    """Return the stable id of a normalised caption: 32 hex digits, which are 128 bits of BLAKE2b hashes.

    At 5 * 10**9 captions 64 bits, which ids had before, give two captions one id with odds of about one half; 128 bits
    with odds of 4 * 10**-20.
    """
    return prompt_digests([caption.encode("utf-8")]).hex()


def prompt_digests(captions: Iterable[bytes]) -> bytes:
    """Return the ids of normalised captions in UTF-8 as bytes, 16 for each, one behind the other.

    The first 8 bytes are the id of runs before 0.2.0, BLAKE2b of 8 bytes, so that ids, seeds and the order of prompts
    go on as they were; the last 8 are the first ones of BLAKE2b of 64 bytes, which has nothing to do with it. (Of the
    longer digests this is the quickest from Python: .7 s per million, as it needs no argument.)
    """
    captions, digest = list(captions), hashlib.blake2b.digest
    old = b"".join(map(digest, map(partial(hashlib.blake2b, digest_size=8), captions)))
    new = b"".join(map(digest, map(hashlib.blake2b, captions)))
    halves_N2 = np.empty((len(captions), 2), np.uint64)
    halves_N2[:, 0], halves_N2[:, 1] = np.frombuffer(old, np.uint64), np.frombuffer(new, np.uint64)[::8]
    return halves_N2.tobytes()


def short_id(prompt: str) -> str:
    """Return the id of a prompt as runs before 0.2.0 have it: its first 16 hex digits."""
    return prompt[:16]


def long_id(prompt: str, caption: str) -> str:
    """Return the id of a prompt of any run as new runs have it.

    Args:
        prompt: the id that its run gives it.
        caption: its normalised caption.
    """
    whole = prompt_id(caption)
    return whole if whole.startswith(prompt) else prompt


def alike(*runs: Iterable[str]) -> Callable[[str], str]:
    """Return what makes prompt ids of several runs comparable: nothing, or `short_id` if one run has short ids.

    Args:
        runs: ids of each run, of which the first tells; ids of one run have one length.
    """
    firsts = [next(iter(ids), None) for ids in runs]
    return short_id if any(first is not None and len(first) == 16 for first in firsts) else str


def sample_seed(prompt: str, sample: int, base: int = 0) -> int:
    """Return the seed of a prompt's `sample`-th generation, in [0, 2**63): a rerun of a row makes the same latents.

    Args:
        prompt: an id, of which the first 64 bits count, so that ids of both lengths give one seed; or another name.
    """
    name = short_id(prompt) if _IS_ID.fullmatch(prompt) else prompt
    digest = hashlib.blake2b(f"{base}/{name}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


_IS_ID = re.compile("[0-9a-f]{32}")


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
        pa.field("copied", pa.list_(pa.string())),  # regions whose score is another region's; null in older runs
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
        pa.field("localization", pa.binary()),  # 8-bit greyscale PNG of the map on the latent grid, as a share of its
        # maximum; only where the label is not NM, and null if the model gives none
        pa.field("localized_foreground", pa.float32()),  # share of that map's mass in the generation's foreground
        pa.field("copied", pa.list_(pa.string())),  # regions whose score is another region's: "foreground",
        # "background"; null in older runs
        pa.field("missing", pa.list_(pa.string())),  # those of them that the pair does not have: without a foreground
        # there is no VM and no FM; null in older runs
        pa.field("terms", pa.map_(pa.string(), pa.float32())),  # what a combined score is made of, by name; null where
        # the metric has none, and in older runs
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
    [  # reference images as an index stores them, one row per image
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("image", pa.binary()),  # encoded (JPEG, PNG, WebP); null where `path` says where it is
        pa.field("mask", pa.binary()),  # 8-bit greyscale PNG, white = foreground; null if it is not made yet
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
        pa.field("match_counts", pa.list_(pa.int32()), nullable=False),  # memorised generations by `match_ids`
        pa.field("match_groups", pa.list_(pa.string()), nullable=False),  # group of near-duplicates by `match_ids`
        pa.field("reach", pa.int32(), nullable=False),  # distinct groups: near-duplicates of one image count once
        pa.field("component", pa.int64(), nullable=False),  # connected by shared training images; 1 is the largest
        pa.field("cluster", pa.int32(), nullable=False),  # by text and images; 0 = in none, 1 does the most harm
        pa.field("signals", pa.map_(pa.string(), pa.float32()), nullable=False),  # detector scores, mean of generations
        pa.field("agreement", pa.float32()),  # of localisation and label, in [0, 1]; null if it says nothing
        pa.field("evidence_file", pa.string()),  # census file of the run folder that holds the generations
        pa.field("evidence_sample", pa.int32(), nullable=False),  # sample number of the best evidence
        pa.field("alike_ids", pa.list_(pa.string())),  # further training images above a threshold; null in older lists
    ]
)

EDGES = pa.schema(
    [  # prompts and the training images that their memorised generations match
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # of near-duplicates: the smallest id among them
        pa.field("generations", pa.int32(), nullable=False),
        pa.field("component", pa.int64(), nullable=False),
    ]
)

COMPONENTS = pa.schema(
    [  # connected components of that graph
        pa.field("component", pa.int64(), nullable=False),
        pa.field("prompts", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),  # input rows of these prompts
        pa.field("images", pa.int64(), nullable=False),  # groups of near-duplicates
        pa.field("VM", pa.int64(), nullable=False),
        pa.field("FM", pa.int64(), nullable=False),
        pa.field("BM", pa.int64(), nullable=False),
        pa.field("severity", pa.float64(), nullable=False),  # summed over prompts
        pa.field("worst_prompt", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # of the worst prompt
        pa.field("reference_ids", pa.list_(pa.string()), nullable=False),
    ]
)

CLUSTERS = pa.schema(
    [  # clusters of flagged prompts by text and shared training images
        pa.field("cluster", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),  # its most telling words
        pa.field("prompts", pa.int64(), nullable=False),
        pa.field("VM", pa.int64(), nullable=False),
        pa.field("FM", pa.int64(), nullable=False),
        pa.field("BM", pa.int64(), nullable=False),
        pa.field("severity", pa.float64(), nullable=False),  # summed over prompts
        pa.field("images", pa.int64(), nullable=False),  # distinct groups of near-duplicates reached
        pa.field("persistence", pa.float32(), nullable=False),  # of HDBSCAN, in [0, 1]
        pa.field("stability", pa.float32()),  # mean Jaccard index to its like in subsamples; null where not measured
        pa.field("medoid", pa.string(), nullable=False),  # prompt id
        pa.field("caption", pa.string(), nullable=False),  # of the medoid
        pa.field("words", pa.list_(pa.string()), nullable=False),
    ]
)

ASSIGNMENTS = pa.schema(
    [  # every clustering of a flagged prompt; 0 = in no cluster
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("cluster", pa.int32(), nullable=False),
        pa.field("strength", pa.float32(), nullable=False),  # of membership in `cluster`, in [0, 1]
        pa.field("text", pa.int32(), nullable=False),  # HDBSCAN on the text alone
        pa.field("component", pa.int64(), nullable=False),
        pa.field("kmeans", pa.int32()),  # KMeans on flattened hidden states, from 1; null if it was not made
    ]
)

REMOVAL = pa.schema(
    [  # training images to drop, most useful first
        pa.field("rank", pa.int64(), nullable=False),  # near-duplicates share one
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("duplicate_of", pa.string()),  # the image that could stay if one of the group is to; null for that one
        pa.field("copies", pa.int64(), nullable=False),  # size of the group
        pa.field("prompts", pa.int64(), nullable=False),  # flagged prompts that reach it
        pa.field("severity", pa.float64(), nullable=False),  # summed over them
        pa.field("cured", pa.int64(), nullable=False),  # prompts no longer flagged once this rank is dropped too
        pa.field("cured_total", pa.int64(), nullable=False),
    ]
)

CHANGES = pa.schema(
    [  # prompts whose verdict differs between two runs
        pa.field("change", pa.string(), nullable=False),  # "new", "gone" or "relabelled"
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("label_before", pa.string(), nullable=False),  # NM where it was not flagged
        pa.field("label_after", pa.string(), nullable=False),
        pa.field("severity_before", pa.float32()),  # null if it was not flagged
        pa.field("severity_after", pa.float32()),
        pa.field("match_ids_before", pa.list_(pa.string()), nullable=False),
        pa.field("match_ids_after", pa.list_(pa.string()), nullable=False),
    ]
)

TRUTH = pa.schema(
    [  # ground truth of a planted world: one row per prompt
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # planted group (the cluster), "" for ordinary prompts
        pa.field("seen", pa.bool_(), nullable=False),  # whether the caption was in the training set
        pa.field("one_to_many", pa.bool_(), nullable=False),
        pa.field("reference_ids", pa.list_(pa.string()), nullable=False),  # training images of the planted group
    ]
)
