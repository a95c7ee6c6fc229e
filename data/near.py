"""When two texts are nearly the same, and which texts of a list are.

A text's shingles are the 5-character windows of its first 1,000 letters and digits, case left out;
two texts are as similar as their sets of shingles (Jaccard).

Shapes: S shingles of a text, G distinct sets of shingles.
"""

import re

import numpy as np
from scipy.sparse import csr_matrix

from data.records import mix, normalise

SHINGLE = 5  # characters
PREFIX = 1000  # letters and digits compared
COMMON = 200  # a shingle of more texts is counted pair by pair, where a pair is left
BLOCK_TEXTS = 256  # compared with all others at once: bounds the memory of their counts
ROUNDING = 1e-9  # of products of sizes and thresholds

_NO_LETTER = re.compile(r"[\W_]+")


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash_S, start): uint32 hashes of all windows, text by text, and each text's start.

    A text with fewer than 5 letters and digits has one window.
    """
    folded = []
    for text in texts:
        plain = _NO_LETTER.sub("", normalise(text).casefold())[:PREFIX]
        folded.append((plain or text[:SHINGLE]).ljust(SHINGLE, "\0"))
    codes = np.frombuffer("".join(folded).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    hashes = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
    for i in range(SHINGLE):
        hashes = hashes * np.uint64(0x100000001B3) + codes[i : i + len(hashes)]
    length = np.array([len(f) for f in folded])
    place = np.arange(len(hashes)) - np.repeat(length.cumsum() - length, length)[: len(hashes)]
    is_inside = place <= np.repeat(length, length)[: len(hashes)] - SHINGLE
    count = length - SHINGLE + 1
    mixed = mix(hashes[is_inside], 0) >> np.uint64(32)
    return mixed.astype(np.uint32), count.cumsum() - count


def shingle_set(text: str) -> np.ndarray:
    """Sorted distinct shingles of a text, for similarity()."""
    return np.unique(shingles([text])[0])


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two shingle sets, in [0, 1]."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def grouped(texts: list[str]) -> tuple[list[int], list[np.ndarray]]:
    """(group of each text, each group's shingle set): texts with the same shingles are one group,
    numbered in order of appearance."""
    group_of: dict[bytes, int] = {}
    groups, sets = [], []
    for text in texts:
        found_S = shingle_set(text)
        group = group_of.setdefault(found_S.tobytes(), len(sets))
        if group == len(sets):
            sets.append(found_S)
        groups.append(group)
    return groups, sets


def near_sets(sets: list[np.ndarray], threshold: float) -> list[list[int]]:
    """For each of some distinct shingle sets the numbers of the others that are near it.

    threshold  least similarity, in (0, 1]
    All are found: of similar sets each has one of the other's shingles among its rarest |set| -
    ceil(threshold |set|) + 1 (the prefix filter of Chaudhuri et al. 2006), so sparse products of
    those with all sets leave out no pair, and what they leave is compared exactly. A low threshold
    takes longer.
    """
    near: list[list[int]] = [[] for _ in sets]
    if len(sets) < 2:
        return near
    size_G = np.array([len(s) for s in sets])
    start_G = size_G.cumsum() - size_G
    _, column, count = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    row = np.repeat(np.arange(len(sets)), size_G)
    order = np.lexsort((column, count[column], row))  # in each set the rarest first
    column, is_common = column[order], count[column[order]] > COMMON
    place = np.arange(len(row)) - start_G[row]
    needed_G = size_G - np.ceil(threshold * size_G - ROUNDING).astype(np.int64) + 1
    is_asked = ~is_common | (place < needed_G[row])
    left_out_G = size_G - np.bincount(row, is_asked, len(sets)).astype(np.int64)
    shape = (len(sets), len(count))
    every = csr_matrix((np.ones(len(row), np.int32), (row, column)), shape).T.tocsr()
    asked = csr_matrix((is_asked.astype(np.int32), (row, column)), shape)
    asked.eliminate_zeros()
    for low in range(0, len(sets), BLOCK_TEXTS):
        shared = (asked[low : low + BLOCK_TEXTS] @ every).tocoo()
        one, other = shared.row + low, shared.col
        wanted = (size_G[one] + size_G[other]) * (threshold / (1 + threshold)) - ROUNDING
        may_be = (other < one) & (shared.data + left_out_G[one] >= wanted)
        for i, j in zip(one[may_be].tolist(), other[may_be].tolist(), strict=True):
            if similarity(sets[i], sets[j]) >= threshold:
                near[i].append(j)
                near[j].append(i)
    return near
