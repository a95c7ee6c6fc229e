"""Train, dev and test where the data has no split of its own, and what leaks between splits.

Rows that share a text belong together: the split goes by connected components, so that no query and
no positive passage is in two splits. Negatives do not connect rows (mined ones would tie everything
into one component); the leakage report counts them.
"""

# Shapes: R rows, E (row, text) incidences, T distinct texts, N rows and texts, C components,
# S shingles, H minhashes

import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from data.near import PREFIX, SHINGLE, shingle_set, shingles, similarity
from data.records import Example, content_hash, mix

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
METHOD = "connected components of shared queries and positives (NFKC, whitespace collapsed)"


@dataclass
class Assignment:
    """Which split each row is in, by number in the order of reading; info is for result files."""

    split_R: np.ndarray  # int8, index into SPLITS
    info: dict[str, Any]

    def select(self, examples: Iterable[Example], split: str) -> Iterator[Example]:
        """The examples of one split; `examples` must come in the order they were assigned in.

        Raises ValueError when there are more or fewer of them: the data has changed.
        """
        wanted = SPLITS.index(split)
        row = -1
        for row, example in enumerate(examples):
            if row >= len(self.split_R):
                break
            if self.split_R[row] == wanted:
                yield example
        if row + 1 != len(self.split_R):
            raise ValueError(
                f"the data has changed since it was split: expected {len(self.split_R)} rows, found"
                f" {'more' if row >= len(self.split_R) else row + 1}"
            )


def incidences(examples: Iterable[Example]) -> tuple[np.ndarray, np.ndarray, int]:
    """(row_E, text_E, number of rows): content hashes of each row's query and positives."""
    rows, texts = array("q"), array("q")
    num_rows = 0
    for num_rows, example in enumerate(examples, 1):
        for text in (example.query, *example.positives):
            rows.append(num_rows - 1)
            texts.append(content_hash(text))
    return np.array(rows, dtype=np.int64), np.array(texts, dtype=np.int64), num_rows


def component_keys(row_E: np.ndarray, text_E: np.ndarray, *, num_rows: int) -> np.ndarray:
    """key_R: the smallest text hash of the row's connected component, which names the component.

    row_E   row numbers in [0, num_rows); every row has at least one text
    text_E  content hashes, int64 >= 0
    """
    text_T, column_E = np.unique(text_E, return_inverse=True)
    size = num_rows + len(text_T)
    edges = coo_matrix(
        (np.ones(len(row_E), dtype=np.int8), (row_E, num_rows + column_E)), (size, size)
    )
    num_components, label_N = connected_components(edges, directed=False)
    key_C = np.full(num_components, np.iinfo(np.int64).max)
    np.minimum.at(key_C, label_N[num_rows:], text_T)
    return key_C[label_N[:num_rows]]


def split_by_components(
    row_E: np.ndarray,
    text_E: np.ndarray,
    *,
    num_rows: int,
    dev_fraction: float,
    test_fraction: float,
    seed: int,
    max_held_out: int | None = None,
) -> Assignment:
    """Rows to train, dev and test, so that rows sharing a text are in one split.

    row_E, text_E   incidences of rows and texts, see incidences()
    *_fraction      share of rows wanted in dev and test, in [0, 1), together below 1
    seed            of the order in which components are drawn
    max_held_out    rows of dev, and of test, at most, whatever the fractions say

    Components are drawn in the order of hash(seed, smallest text hash), so the result does not
    depend on the order of rows. Each goes to whichever of test and dev has the larger share of its
    rows to fill, if it fits there, else to train. One too large for either is in train, and a
    warning names it if a split stays short for that.
    Raises ValueError for fractions out of range and for no rows.
    """
    if not (0 <= dev_fraction < 1 and 0 <= test_fraction < 1 and dev_fraction + test_fraction < 1):
        raise ValueError(
            f"data.dev_fraction ({dev_fraction}) and data.test_fraction ({test_fraction}) must be"
            " in [0, 1), together below 1"
        )
    if num_rows == 0:
        raise ValueError("cannot split 0 rows; expected examples")
    key_R = component_keys(row_E, text_E, num_rows=num_rows)
    key_C, label_R, size_C = np.unique(key_R, return_inverse=True, return_counts=True)
    order_C = np.lexsort((key_C, mix(key_C, seed)))
    most = num_rows if max_held_out is None else max_held_out
    wanted = {
        name: min(most, max(1, round(fraction * num_rows))) if fraction else 0
        for name, fraction in (("test", test_fraction), ("dev", dev_fraction))
    }
    room = dict(wanted)
    room_train = num_rows - 1  # train keeps at least one row
    split_C = np.zeros(len(key_C), dtype=np.int8)
    for c, size in zip(order_C.tolist(), size_C[order_C].tolist(), strict=True):
        if not any(room.values()):
            break
        for name in sorted(room, key=lambda n: -room[n] / max(1, wanted[n])):
            if size <= min(room[name], room_train):
                split_C[c] = SPLITS.index(name)
                room[name] -= size
                room_train -= size
                break
    split_R = split_C[label_R]
    largest = int(size_C.max())
    rows = {name: int((split_R == i).sum()) for i, name in enumerate(SPLITS)}
    info = {
        "method": METHOD,
        "seed": seed,
        "fractions": {"dev": dev_fraction, "test": test_fraction},
        "max_held_out": max_held_out,
        "rows": rows,
        "components": len(key_C),
        "largest_component": {"rows": largest, "share": round(largest / num_rows, 4)},
        "digest": _digest(key_C, split_C),
    }
    short = [
        name
        for name, left in room.items()
        if left > max(1, 0.1 * wanted[name]) or (wanted[name] and not rows[name])
    ]
    if short:
        log.warning(
            "rows that share texts cannot be parted: of %d rows %d are in dev (%d wanted) and %d in"
            " test (%d wanted); the largest group of connected rows, %d (%.1f%%), is in train",
            num_rows,
            rows["dev"],
            wanted["dev"],
            rows["test"],
            wanted["test"],
            largest,
            100 * largest / num_rows,
        )
    return Assignment(split_R, info)


def split_examples(
    examples: Iterable[Example],
    *,
    dev_fraction: float,
    test_fraction: float,
    seed: int,
    max_held_out: int | None = None,
) -> Assignment:
    """split_by_components over a stream of examples, read once; holds 16 bytes a text."""
    row_E, text_E, num_rows = incidences(examples)
    return split_by_components(
        row_E,
        text_E,
        num_rows=num_rows,
        dev_fraction=dev_fraction,
        test_fraction=test_fraction,
        seed=seed,
        max_held_out=max_held_out,
    )


def _digest(key_C: np.ndarray, split_C: np.ndarray) -> str:
    """Hex digest of the split itself, equal for equal splits in any order of rows."""
    return blake2b(key_C.astype("<i8").tobytes() + split_C.tobytes(), digest_size=8).hexdigest()


# -- leakage ------------------------------------------------------------------------------------

NUM_HASHES = 64
ROWS_A_BAND = (
    4  # 16 bands of 4: a pair at similarity .8 is missed with probability 2e-4, at .9 below 1e-7
)
MAX_PARTNERS = 20  # candidates checked for a text and band: bounds the cost of boilerplate


@dataclass
class _Side:
    """The texts of one split in one role, distinct by content hash."""

    where: dict[int, str]
    text: dict[int, str]  # of the texts kept for near duplicates
    num_left_out: int = 0


def leakage_report(
    splits: Mapping[str, Iterable[Example]],
    *,
    threshold: float = 0.8,
    max_texts: int = 20_000,
    num_examples: int = 10,
) -> dict[str, Any]:
    """Texts that two splits share, exactly or nearly.

    splits        name -> examples; the earlier split of a pair is the one that is leaked from
    threshold     least Jaccard similarity of a near duplicate, in (0, 1]
    max_texts     texts a split and role compared for near duplicates (those of smallest hash); all
                  texts are compared exactly
    num_examples  pairs shown for each pair of splits

    Exact: the same content hash, for queries, positives, negatives ("negatives": a negative of the
    earlier split that is a positive of the later), and a query of one that is a positive of the
    other ("across"). Near: Jaccard similarity of the sets of 5-character shingles of the first
    1,000 letters and digits, case left out, for queries and positives. Candidates come from MinHash
    bands (64 hashes, 16 bands); every one counted was compared exactly. A pair at similarity .8 is
    missed with probability 2e-4, at .6 with .1: a lower threshold finds fewer than there are.
    Counts are distinct texts of the later split.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"leakage_report: threshold ({threshold}) must be in (0, 1]")
    sides = {name: _collect(examples, max_texts) for name, examples in splits.items()}
    report: dict[str, Any] = {
        "method": f"exact after NFKC and whitespace; near: Jaccard of {SHINGLE}-character shingles"
        f" of the first {PREFIX} letters and digits >= {threshold}, by MinHash of {NUM_HASHES}",
        "threshold": threshold,
        "texts": {
            name: {role: len(side.where) for role, side in roles.items()}
            for name, roles in sides.items()
        },
        "not_compared_for_near": sum(
            s.num_left_out for roles in sides.values() for s in roles.values()
        ),
        "pairs": {},
    }
    sketches = {
        (name, role): _sketch(side.text)
        for name, roles in sides.items()
        for role, side in roles.items()
        if role != "negatives"
    }
    for one, two in combinations(splits, 2):
        a, b = sides[one], sides[two]
        found: list[dict[str, Any]] = []
        counts = {}
        for kind, left, right in (
            ("queries", a["queries"], b["queries"]),
            ("positives", a["positives"], b["positives"]),
            ("negatives", a["negatives"], b["positives"]),
            ("across", a["queries"], b["positives"]),
            ("across", a["positives"], b["queries"]),
        ):
            shared = sorted(left.where.keys() & right.where.keys())
            name = f"exact_{kind}"
            counts[name] = counts.get(name, 0) + len(shared)
            found += [_shown(name, h, h, left, right, 1.0) for h in shared[:num_examples]]
        for role in ("queries", "positives"):
            near = _near(a[role], b[role], sketches[one, role], sketches[two, role], threshold)
            counts[f"near_{role}"] = len(near)
            found += [
                _shown(f"near_{role}", h, g, a[role], b[role], s) for h, g, s in near[:num_examples]
            ]
        # every kind gets its turn among the few that are shown
        turn: dict[str, int] = {}
        order = []
        for item in found:
            turn[item["kind"]] = turn.get(item["kind"], -1) + 1
            order.append(turn[item["kind"]])
        ranked = [
            item for _, item in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])
        ]
        report["pairs"][f"{one}/{two}"] = {**counts, "examples": ranked[:num_examples]}
    return report


def _collect(examples: Iterable[Example], max_texts: int) -> dict[str, _Side]:
    sides = {role: _Side({}, {}) for role in ("queries", "positives", "negatives")}
    for e in examples:
        for role, texts in (
            ("queries", [e.query]),
            ("positives", e.positives),
            ("negatives", e.negatives),
        ):
            side = sides[role]
            for text in texts:
                key = content_hash(text)
                if key not in side.where:
                    side.where[key] = e.where
                    side.text[key] = text[: 2 * PREFIX]
                    if len(side.text) >= 2 * max_texts:
                        _trim(side, max_texts)
    for side in sides.values():
        _trim(side, max_texts)
        side.num_left_out = len(side.where) - len(side.text)
    sides["negatives"].num_left_out = 0
    return sides


def _trim(side: _Side, max_texts: int) -> None:
    if len(side.text) > max_texts:
        side.text = {key: side.text[key] for key in sorted(side.text)[:max_texts]}


def _shown(
    kind: str, h: int, g: int, left: _Side, right: _Side, similarity: float
) -> dict[str, Any]:
    return {
        "kind": kind,
        "where": [left.where[h], right.where[g]],
        "texts": [left.text.get(h, "")[:200], right.text.get(g, "")[:200]],
        "similarity": round(similarity, 4),
    }


def _sketch(texts: dict[int, str]) -> dict[str, np.ndarray]:
    """Keys of the texts in rising order, and their minhashes, (texts, NUM_HASHES) uint32."""
    rng = np.random.default_rng(0x5EED)
    factors = rng.integers(0, 2**31, NUM_HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    salts = rng.integers(0, 2**32, NUM_HASHES, dtype=np.uint32)
    keys = sorted(texts)
    minimum = np.empty((len(keys), NUM_HASHES), dtype=np.uint32)
    for begin in range(0, len(keys), 256):  # some hundred thousand shingles at once
        chunk = keys[begin : begin + 256]
        hash_S, start = shingles([texts[k] for k in chunk])
        for i in range(NUM_HASHES):
            permuted = (hash_S ^ salts[i]) * factors[i]
            minimum[begin : begin + len(chunk), i] = np.minimum.reduceat(permuted, start)
    return {"keys": np.array(keys, dtype=np.int64), "minimum": minimum}


def _band(minimum: np.ndarray, band: int) -> np.ndarray:
    """One uint64 a text for a band of ROWS_A_BAND minhashes."""
    value = np.zeros(len(minimum), dtype=np.uint64)
    for column in range(band * ROWS_A_BAND, (band + 1) * ROWS_A_BAND):
        value = value * np.uint64(0x9E3779B97F4A7C15) + minimum[:, column]
    return value


def _near(
    a: _Side,
    b: _Side,
    sketch_a: dict[str, np.ndarray],
    sketch_b: dict[str, np.ndarray],
    threshold: float,
) -> list[tuple[int, int, float]]:
    """(text of a, text of b, similarity) for each text of b near one of a, and equal to none."""
    candidates: dict[int, set[int]] = {}
    for band in range(NUM_HASHES // ROWS_A_BAND):
        value_a, value_b = _band(sketch_a["minimum"], band), _band(sketch_b["minimum"], band)
        order_a = np.argsort(value_a, kind="stable")
        start = np.searchsorted(value_a[order_a], value_b, side="left")
        stop = np.searchsorted(value_a[order_a], value_b, side="right")
        for j in np.flatnonzero(stop > start).tolist():
            partners = order_a[start[j] : min(stop[j], start[j] + MAX_PARTNERS)]
            candidates.setdefault(j, set()).update(partners.tolist())
    near = []
    for j in sorted(candidates):
        g = int(sketch_b["keys"][j])
        if g in a.where:
            continue  # an exact duplicate, counted as such
        partners = np.array(sorted(candidates[j]))
        agree = (sketch_a["minimum"][partners] == sketch_b["minimum"][j]).mean(axis=1)
        # four standard deviations of the estimate below the threshold is not worth an exact look
        partners = partners[agree >= threshold - 0.2]
        own = shingle_set(b.text[g])
        best, best_key = 0.0, 0
        for i in partners.tolist():
            h = int(sketch_a["keys"][i])
            found = similarity(own, shingle_set(a.text[h]))
            if found > best:
                best, best_key = found, h
        if best >= threshold:
            near.append((best_key, g, best))
    return sorted(near, key=lambda n: (-n[2], n[1]))
