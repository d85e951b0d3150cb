"""Which type of index: by the number of vectors and the memory a node has for them.

Exact search while it is affordable; then lists (IVF) of full vectors; then lists of compressed vectors, whose answers
are ranked again with vectors in half precision that stay on disk. FAISS' own guidelines set the number of lists;
figures in docs/index.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from memscan.errors import ConfigError

# Exact search of 512 dimensions costs 0.1 ms a query and 1,000 vectors on one core; up to here a generation's three
# searches stay below the time of one denoiser call.
EXACT_UP_TO = 50_000
COMPRESSED_FROM = 20_000_000  # full vectors of three regions of 512 dimensions take 123 GB here
# FAISS warns below 39 training vectors a list.
TRAINING_VECTORS_A_LIST = 39
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Choice:
    """An index type with its reason.

    Attributes:
        factory: FAISS factory string.
        nprobe: lists a search looks into.
        why: one sentence for the manifest.
    """

    factory: str
    nprobe: int
    why: str


def choose(count: int, dimension: int, regions: int = 3, memory: int | None = None) -> Choice:
    """The index type for so many vectors.

    Args:
        count: references.
        dimension: length of a vector.
        regions: indexes over them.
        memory: bytes a node has for the index; None for no limit. Half precision vectors are read from disk.
    """
    full = count * dimension * 4 * regions
    tight = memory is not None and full > memory
    limit = (
        f" and {full / 1e9:.3g} GB of full vectors do not fit into {memory / 1e9:.3g} GB" if tight and memory else ""
    )
    if count <= EXACT_UP_TO and not tight:
        return Choice("Flat", 1, f"{count:,} vectors are searched exactly in milliseconds")
    lists = _lists(count)
    nprobe = max(8, lists // 64)
    if not tight and count < COMPRESSED_FROM:
        return Choice(f"IVF{lists},Flat", nprobe, f"{count:,} vectors in {lists:,} lists, {nprobe} of them searched")
    bytes_a_vector = _code_bytes(count, dimension, regions, memory)
    factory = f"OPQ{bytes_a_vector}_{bytes_a_vector * 4},IVF{lists},PQ{bytes_a_vector}x4fsr"
    if bytes_a_vector * 4 > dimension:
        factory = f"IVF{lists},PQ{bytes_a_vector}x4fsr"
    why = f"{count:,} vectors{limit}: codes of {bytes_a_vector // 2} bytes, ranked again in half precision"
    return Choice(factory, nprobe, why)


def is_compressed(factory: str) -> bool:
    """Whether similarities of this index are approximate, so that answers must be ranked again."""
    return bool(re.search(r"PQ|SQ|RQ|LSQ|,LSH|RaBitQ", re.sub(r"OPQ\d+(_\d+)?", "", factory)))


def parse_memory(text: str) -> int:
    """Bytes of "8GB", "500 MiB" or "1e9". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]I?B|)\s*", text.upper().replace("E", "e"))
    try:
        if match is None:
            raise ValueError
        size = int(float(match[1]) * _UNITS[match[2]])
    except (ValueError, KeyError):
        raise ConfigError(f"not a size: {text!r}", where="--memory", hint="for example 8GB") from None
    if size <= 0:
        raise ConfigError("must be more than nothing", where="--memory")
    return size


def _lists(count: int) -> int:
    """A power of two near 4 sqrt(N), with enough vectors to train each list."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(count)))
    most = 2 ** int(math.log2(max(1, count // TRAINING_VECTORS_A_LIST)))
    return int(max(1, min(wanted, most, 2**20)))


def _code_bytes(count: int, dimension: int, regions: int, memory: int | None) -> int:
    """Sub-quantisers of 4 bits: as many as fit, among those that divide the dimension; at most half of it."""
    fitting = [m for m in range(dimension // 2, 7, -1) if dimension % m == 0 and m % 8 == 0] or [dimension]
    if memory is None:
        return next((m for m in fitting if m <= dimension // 4), fitting[-1])
    # 4 bits a sub-quantiser, 8 bytes of id.
    return next((m for m in fitting if count * regions * (m // 2 + 8) <= memory), fitting[-1])
