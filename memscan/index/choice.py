"""This module chooses the type of an index by the number of vectors and the memory that a node has for them.

It chooses exact search while that is affordable, then lists (IVF) of full vectors, and then lists of compressed
vectors, whose answers are ranked again with half-precision vectors that stay on disk. The number of lists follows
FAISS' own guidelines. docs/index.md has figures.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from memscan.errors import ConfigError

# Exact search of 512 dimensions costs 10 ms a query and million vectors where queries come by the hundred, 200 ms where
# they come alone; up to here a generation's three searches stay below the time of one denoiser call.
EXACT_UP_TO = 50_000
# From here on codes, whose answers are ranked again, are faster by more than ten than lists of full vectors, and find
# near copies as well (docs/benchmarks.md).
COMPRESSED_FROM = 200_000
CODES = 64  # sub-quantisers of 4 bits: 32 bytes per vector
MOST_LISTS = 2**18  # trained on 10 million vectors
GRAPH_FROM = 2**16  # so many centroids are searched through a graph
TRAINING_VECTORS_A_LIST = 39  # FAISS warns below
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Choice:
    """A choice is an index type with the reason for it.

    Attributes:
        factory: FAISS factory string.
        nprobe: lists a search looks into.
        why: one sentence for the manifest.
    """

    factory: str
    nprobe: int
    why: str


def choose(count: int, dimension: int, regions: int = 3, memory: int | None = None) -> Choice:
    """Return the index type for a number of vectors.

    Args:
        count: references.
        dimension: length of a vector.
        regions: indexes over them.
        memory: bytes that a node has for the index; None for no limit. Half precision vectors are read from disk.
    """
    full = count * dimension * 4 * regions
    tight = memory is not None and full > memory
    limit = (
        f" and {full / 1e9:.3g} GB of full vectors do not fit into {memory / 1e9:.3g} GB" if tight and memory else ""
    )
    if count <= EXACT_UP_TO and not tight:
        return Choice("Flat", 1, f"{count:,} vectors are searched exactly in milliseconds")
    lists = _lists(count)
    quantiser = f"IVF{lists}_HNSW32" if lists >= GRAPH_FROM else f"IVF{lists}"
    if not tight and count < COMPRESSED_FROM:
        nprobe = max(16, lists // 32)
        return Choice(f"{quantiser},Flat", nprobe, f"{count:,} vectors in {lists:,} lists, {nprobe} of them searched")
    codes = _codes(count, dimension, regions, memory)
    reduced = f"OPQ{codes}_{codes * 2}," if codes * 2 < dimension else f"OPQ{codes}," if dimension % codes == 0 else ""
    why = f"{count:,} vectors{limit}: codes of {codes // 2} bytes, the nearest ranked again in half precision"
    return Choice(f"{reduced}{quantiser},PQ{codes}x4fsr", max(16, lists // 256), why)


def is_compressed(factory: str) -> bool:
    """Return whether similarities of this index are approximate, so that answers must be ranked again."""
    return bool(re.search(r"PQ|SQ|RQ|LSQ|,LSH|RaBitQ", re.sub(r"OPQ\d+(_\d+)?", "", factory)))


def parse_memory(text: str) -> int:
    """Return bytes of "8GB", "500 MiB" or "1e9". Raises ConfigError for any other text."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]I?B|)\s*", text.upper().replace("E", "e"))
    try:
        if match is None:
            raise ValueError
        size = int(float(match[1]) * _UNITS[match[2]])
    except (ValueError, KeyError):
        raise ConfigError(f"not a size: {text!r}", where="--memory", hint="for example 8GB") from None
    if size <= 0:
        raise ConfigError("must be greater than zero", where="--memory")
    return size


def _lists(count: int) -> int:
    """Return a power of two near 4 sqrt(N), with enough vectors to train each list."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(count)))
    most = 2 ** int(math.log2(max(1, count // TRAINING_VECTORS_A_LIST)))
    return int(max(1, min(wanted, most, MOST_LISTS)))


def _codes(count: int, dimension: int, regions: int, memory: int | None) -> int:
    """Sub-quantisers: 64, or as many as the memory has room for; a number that divides the dimension."""
    divisors = [m for m in range(min(CODES, dimension), 0, -1) if dimension % m == 0 and m % 2 == 0] or [dimension]
    # 4 bits each, and 8 bytes of id.
    fitting = [m for m in divisors if memory is None or count * regions * (m // 2 + 8) <= memory]
    return fitting[0] if fitting else divisors[-1]
