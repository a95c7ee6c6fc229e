"""A data set's folder in the cache: the training examples as texts and index vectors, and the
held-out retrieval sets.
"""

# Shapes: E examples, P (example, passage) pairs, Q queries and G judgements of a retrieval set

import logging
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.batches import Ragged
from data.cache import Strings, StringsWriter
from data.formats import Example, RerankSet, RetrievalSet, content_hash
from data.records import HashIndex

log = logging.getLogger(__name__)

# training examples whose texts are looked at for near duplicates; 10 microseconds a text each
MAX_LEAKAGE_EXAMPLES = 200_000
HASH_BLOCK = 1 << 20
GROUP_VALUES = ("positive_grades", "positive_scores", "negative_scores")  # beside the passages


class _Side:
    """Distinct texts of one side in order of appearance."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._writer = StringsWriter(folder, name)
        self._numbers = HashIndex()
        self._hashes = array("q")

    def __len__(self) -> int:
        return len(self._writer)

    def add(self, text: str) -> int:
        key = content_hash(text)
        number = self._numbers.add(key, len(self._writer))
        if number is None:
            number = self._writer.append(text)
            self._hashes.append(key)
        return number

    def close(self) -> str:
        np.save(self._folder / f"{self._name}.hash.npy", np.array(self._hashes, np.int64))
        return self._writer.close()


class ExamplesWriter:
    """Streams examples into a folder; in memory 30 to 50 bytes a distinct text and 8 a pair.

    groups  for rerankers: grades and scores are kept, the examples of one query become one, and an
            example may have no positive
    """

    def __init__(self, folder: Path, groups: bool = False) -> None:
        self._folder, self._groups = folder, groups
        self._queries, self._passages = _Side(folder, "queries"), _Side(folder, "passages")
        self._labels = StringsWriter(folder, "labels")
        self._query_E = array("q")
        self._positives, self._negatives = array("q"), array("q")
        self._positive_ends, self._negative_ends = array("q", [0]), array("q", [0])
        self._values = {name: array("f") for name in GROUP_VALUES} if groups else {}
        self.digests: dict[str, str] = {}
        self._bar = tqdm(desc="read", unit="example", leave=False, delay=2)

    def add(self, example: Example) -> None:
        self._bar.update()
        query = self._queries.add(example.query)
        self._query_E.append(query)
        assert example.positives or (self._groups and example.negatives), example
        self._add_side(example, "positives", self._positives)
        self._positive_ends.append(len(self._positives))
        self._add_side(example, "negatives", self._negatives)
        self._negative_ends.append(len(self._negatives))
        if self._groups and query < len(self._labels):
            return  # a group is labelled by its first row
        same = example.id == example.where
        self._labels.append(example.id if same else f"{example.id} ({example.where})")

    def _add_side(self, example: Example, side: str, numbers: array) -> None:
        """The distinct passages of one side, with the values of the first of equal ones."""
        first: dict[int, int] = {}
        for i, text in enumerate(getattr(example, side)):
            first.setdefault(self._passages.add(text), i)
        numbers.extend(first)
        for name, values in self._values.items():
            if name.startswith(side[:8]):
                given = getattr(example, name)
                missing = 1.0 if name == "positive_grades" else math.nan
                values.extend(missing if given is None else given[i] for i in first.values())

    def close(self) -> dict[str, int]:
        """Sizes. Negatives that answer their query somewhere in the data are left out here, and
        counted.
        """
        self._bar.close()
        if not self._query_E:
            raise ValueError("the training split has no examples")
        query_E, positives, negatives = (
            np.array(a, np.int64) for a in (self._query_E, self._positives, self._negatives)
        )
        positive_ends, negative_ends = np.array(self._positive_ends), np.array(self._negative_ends)
        num_passages = max(1, len(self._passages))

        def keys(passages: np.ndarray, ends: np.ndarray) -> np.ndarray:
            return np.repeat(query_E, np.diff(ends)) * num_passages + passages

        is_answer = np.isin(keys(negatives, negative_ends), keys(positives, positive_ends))
        kept_before = np.concatenate([[0], np.cumsum(~is_answer)])
        arrays = {
            "query_E": query_E,
            "positive_ends": positive_ends,
            "positives": positives,
            "negative_ends": kept_before[negative_ends],
            "negatives": negatives[~is_answer],
        }
        if self._groups:
            arrays |= {name: np.array(v, np.float32) for name, v in self._values.items()}
            arrays["negative_scores"] = arrays["negative_scores"][~is_answer]
            arrays = _one_a_query(arrays, num_passages)
        for name, values in arrays.items():
            np.save(self._folder / f"{name}.npy", values)
        sizes = {
            "examples": len(arrays["query_E"]),
            "queries": len(self._queries),
            "passages": len(self._passages),
            "positives": len(arrays["positives"]),
            "negatives": len(arrays["negatives"]),
            "negatives_that_are_positives": int(is_answer.sum()),
        }
        if self._groups:
            sizes["without_positives"] = int((np.diff(arrays["positive_ends"]) == 0).sum())
        if is_answer.any():
            log.warning(
                "%s negatives are positives of the same query and are left out",
                f"{int(is_answer.sum()):,}",
            )
        self.digests = {"queries": self._queries.close(), "passages": self._passages.close()}
        self._labels.close()
        return sizes


def _one_a_query(arrays: dict[str, np.ndarray], num_passages: int) -> dict[str, np.ndarray]:
    """The arrays of a folder with the examples of each query as one, in the order of queries;
    a passage that comes twice keeps its first values.
    """
    query_E = arrays["query_E"]
    num_queries = int(query_E.max()) + 1  # numbered by first appearance, so all are there
    out = {"query_E": np.arange(num_queries)}
    for side in ("positive", "negative"):
        owner = np.repeat(query_E, np.diff(arrays[f"{side}_ends"]))
        _, first = np.unique(owner * num_passages + arrays[f"{side}s"], return_index=True)
        kept = np.sort(first)
        kept = kept[np.argsort(owner[kept], kind="stable")]
        count = np.bincount(owner[kept], minlength=num_queries)
        out[f"{side}_ends"] = np.concatenate([[0], np.cumsum(count)])
        for name in (f"{side}s", *(n for n in GROUP_VALUES if n.startswith(side))):
            out[name] = arrays[name][kept]
    return out


def stored_examples(folder: Path, held: Iterable[Example] = ()) -> Iterator[Example]:
    """The training examples of a finished folder; of more than MAX_LEAKAGE_EXAMPLES that many,
    evenly spread, and for every text that one of `held` has as query or positive the first that
    asks it, the first that has it as a positive and the first that has it as a negative.
    """
    queries, passages, labels = (Strings(folder, n) for n in ("queries", "passages", "labels"))
    query_E, positives, negatives = index_arrays(folder)
    num = len(query_E)
    chosen = np.unique(np.linspace(0, num - 1, min(num, MAX_LEAKAGE_EXAMPLES)).astype(np.int64))
    if num > MAX_LEAKAGE_EXAMPLES:
        chosen = np.union1d(chosen, _sharing(folder, held, query_E, positives, negatives))
    for start in range(0, len(chosen), 4096):
        rows = chosen[start : start + 4096]
        sides = []
        for ragged in (positives, negatives):
            values, owner = ragged.take(rows)
            sides.append(np.split(values, np.searchsorted(owner, np.arange(1, len(rows)))))
        for e, some, others in zip(rows.tolist(), *sides, strict=True):
            yield Example(
                query=queries[query_E[e]],
                positives=[passages[p] for p in some.tolist()],
                negatives=[passages[p] for p in others.tolist()],
                where=labels[e],
                id=labels[e],
            )


def _sharing(
    folder: Path, held: Iterable[Example], query_E: np.ndarray, *sides: Ragged
) -> np.ndarray:
    """The examples that stored_examples takes for `held`; all stored hashes are looked at."""
    wanted = np.unique(
        np.array([content_hash(t) for e in held for t in (e.query, *e.positives)], np.int64)
    )

    def first(values: np.ndarray, texts: np.ndarray) -> np.ndarray:
        places = np.flatnonzero(np.isin(values, texts))
        return places[np.unique(values[places], return_index=True)[1]]

    rows = [first(query_E, stored_among(folder, "queries", wanted)[0])]
    passages, _ = stored_among(folder, "passages", wanted)
    for side in sides:
        rows.append(np.searchsorted(side.offsets, first(side.values, passages), "right") - 1)
    return np.concatenate(rows)


def stored_among(folder: Path, name: str, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, hashes) of the training texts, name queries or passages, whose hash is wanted."""
    hash_T = np.load(folder / f"{name}.hash.npy", mmap_mode="r")
    found = [np.zeros(0, np.int64)]
    for low in range(0, len(hash_T), HASH_BLOCK):
        found.append(low + np.flatnonzero(np.isin(hash_T[low : low + HASH_BLOCK], wanted)))
    numbers = np.concatenate(found)
    return numbers, hash_T[numbers]


def text_counts(folder: Path) -> dict[str, int]:
    """Distinct texts of all training examples: queries, positives, negatives."""
    query_E, positives, negatives = index_arrays(folder)
    return {
        "queries": len(np.unique(query_E)),
        "positives": len(np.unique(positives.values)),
        "negatives": len(np.unique(negatives.values)),
    }


def index_arrays(folder: Path) -> tuple[np.ndarray, Ragged, Ragged]:
    """query_E, and the passages of every example's positives and negatives."""

    def array_of(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy")

    return (
        array_of("query_E"),
        Ragged(array_of("positive_ends"), array_of("positives")),
        Ragged(array_of("negative_ends"), array_of("negatives")),
    )


# -- retrieval sets -----------------------------------------------------------------------------


def _save_strings(folder: Path, name: str, texts: Iterable[str]) -> None:
    writer = StringsWriter(folder, name)
    for text in texts:
        writer.append(text)
    writer.close()


def save_sets(folder: Path, sets: dict[str, RetrievalSet]) -> dict[str, dict[str, str]]:
    """Set -> names of its tables, and whether its ids are shared. Sets over the same corpus share
    one.
    """
    stored: dict[str, dict[str, str]] = {}
    for key, one in sets.items():
        twin = next(
            (
                k
                for k in stored
                if sets[k].doc_ids == one.doc_ids and sets[k].doc_texts == one.doc_texts
            ),
            None,
        )
        if twin is None:
            _save_strings(folder, f"{key}.doc_ids", one.doc_ids)
            _save_strings(folder, f"{key}.doc_texts", one.doc_texts)
        _save_strings(folder, f"{key}.query_ids", one.query_ids)
        _save_strings(folder, f"{key}.query_texts", one.query_texts)
        doc_number = {d: n for n, d in enumerate(one.doc_ids)}
        judged_G3 = [
            (n, doc_number[d], grade)
            for n, q in enumerate(one.query_ids)
            for d, grade in one.qrels[q].items()
        ]
        np.save(folder / f"{key}.qrels.npy", np.array(judged_G3, np.int64).reshape(-1, 3))
        if isinstance(one, RerankSet) and one.candidates is not None:
            offered = [
                (n, doc_number[d]) for n, q in enumerate(one.query_ids) for d in one.candidates[q]
            ]
            np.save(folder / f"{key}.candidates.npy", np.array(offered, np.int64).reshape(-1, 2))
        stored[key] = {"queries": key, "docs": stored[twin]["docs"] if twin else key}
        if one.shares_ids:
            stored[key]["ids"] = "shared"
    return stored


def load_set(
    folder: Path, stored: dict[str, str], name: str, groups: bool
) -> RetrievalSet | RerankSet:
    """The set that save_sets stored; groups: with the candidates of its queries."""
    queries, docs = stored["queries"], stored["docs"]
    doc_ids, query_ids = (
        list(Strings(folder, f"{docs}.doc_ids")),
        list(Strings(folder, f"{queries}.query_ids")),
    )
    qrels: dict[str, dict[str, int]] = {q: {} for q in query_ids}
    for q, d, grade in np.load(folder / f"{queries}.qrels.npy").tolist():
        qrels[query_ids[q]][doc_ids[d]] = grade
    one = RetrievalSet(
        name=name,
        doc_ids=doc_ids,
        doc_texts=list(Strings(folder, f"{docs}.doc_texts")),
        query_ids=query_ids,
        query_texts=list(Strings(folder, f"{queries}.query_texts")),
        qrels=qrels,
        shares_ids=stored.get("ids") == "shared",
    )
    if not groups:
        return one
    path = folder / f"{queries}.candidates.npy"
    candidates: dict[str, list[str]] | None = None
    if path.is_file():
        candidates = {q: [] for q in query_ids}
        for q, d in np.load(path).tolist():
            candidates[query_ids[q]].append(doc_ids[d])
    return RerankSet(**vars(one), candidates=candidates)
