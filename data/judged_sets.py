"""Examples as sets to be judged by: a RetrievalSet for retrievers, a RerankSet for rerankers."""

import logging
from collections.abc import Iterator
from itertools import chain
from math import floor

from data.records import (
    BadRows,
    Example,
    RerankSet,
    RetrievalSet,
    content_hash,
    hash_bytes,
)

log = logging.getLogger(__name__)


def retrieval_set(
    examples: Iterator[Example], name: str, bad: BadRows | None = None
) -> RetrievalSet:
    """Examples as a RetrievalSet, see read_retrieval_set; also for held-out rows of a split."""
    bad = bad if bad is not None else BadRows()
    docs, queries = _Texts("d"), _Texts("q")
    grades: dict[int, dict[int, int]] = {}
    for e in examples:
        given = None if e.id == e.where else e.id
        query = queries.add(e.query, given, e.where, bad)
        positive_ids = e.positive_ids or [None] * len(e.positives)
        scores = e.positive_grades or e.positive_scores or [1.0] * len(e.positives)
        positives = [
            docs.add(t, i, e.where, bad) for t, i in zip(e.positives, positive_ids, strict=True)
        ]
        for text, i in zip(e.negatives, e.negative_ids or [None] * len(e.negatives), strict=True):
            docs.add(text, i, e.where, bad)
        if query is None:
            continue
        judged = grades.setdefault(query, {})
        for doc, score in zip(positives, scores, strict=True):
            if doc is not None:
                is_grade = score == int(score) and (score > 0 or _is_pair(e))
                grade = int(score) if is_grade else 1
                judged[doc] = max(grade, judged.get(doc, grade))
    doc_ids, query_ids = docs.ids(), queries.ids()
    answered = _answered(grades, name)
    return RetrievalSet(
        name=name,
        doc_ids=doc_ids,
        doc_texts=docs.texts,
        query_ids=[query_ids[q] for q in answered],
        query_texts=[queries.texts[q] for q in answered],
        qrels={query_ids[q]: {doc_ids[d]: g for d, g in grades[q].items()} for q in answered},
    )


def _answered(grades: dict[int, dict[int, int]], name: str) -> list[int]:
    """Queries with a relevant document. The others cannot be judged and are left out, with a word
    about how many."""
    answered = [q for q, judged in grades.items() if any(g > 0 for g in judged.values())]
    if len(answered) < len(grades):
        log.info("%s: left out %d queries without a positive", name, len(grades) - len(answered))
    return answered


def _is_pair(example: Example) -> bool:
    return len(example.positives) == 1 and not example.negatives


def rerank_set(groups: Iterator[Example], name: str, bad: BadRows | None = None) -> RerankSet:
    """Groups as a RerankSet: each query's candidates are its positives and negatives.

    Documents and queries are told by the data's ids, those without one by content_hash. A grade
    that is no whole number becomes the nearest: 0.5 is relevant, 0.4 is not. Queries without a
    positive cannot be judged and are left out. Where no query has a negative the
    candidates are None: a first stage has to find them among all the documents.
    """
    bad = bad if bad is not None else BadRows()
    docs, queries = _Texts("d", by_id=True), _Texts("q", by_id=True)
    grades: dict[int, dict[int, int]] = {}
    num_rounded = 0
    for e in groups:
        query = queries.add(e.query, None if e.id == e.where else e.id, e.where, bad)
        side_grades = [e.positive_grades or [1.0] * len(e.positives), [0.0] * len(e.negatives)]
        side_ids = [
            e.positive_ids or [None] * len(e.positives),
            e.negative_ids or [None] * len(e.negatives),
        ]
        passages = zip(
            [*e.positives, *e.negatives], chain(*side_ids), chain(*side_grades), strict=True
        )
        # positives must not come first: numbers made up for documents break ties
        for text, given, grade in sorted(passages, key=lambda p: content_hash(p[0])):
            doc = docs.add(text, given, e.where, bad)
            if query is not None and doc is not None:
                whole = max(0, floor(grade + 0.5))
                num_rounded += grade != int(grade)
                judged = grades.setdefault(query, {})
                judged[doc] = max(whole, judged.get(doc, 0))
    doc_ids, query_ids = docs.ids(), queries.ids()
    if num_rounded:
        log.warning(
            "%s: %d labels are not whole numbers; judged are the nearest: below 0.5 not relevant",
            name, num_rounded,
        )  # fmt: skip
    answered = _answered(grades, name)
    candidates = None
    if any(0 in grades[q].values() for q in answered):
        candidates = {
            query_ids[q]: sorted((doc_ids[d] for d in grades[q]), key=_id_order) for q in answered
        }
        alone = sum(0 not in grades[q].values() for q in answered)
        if alone:
            log.warning("%s: %d queries have no candidate that is not relevant", name, alone)
    return RerankSet(
        name=name,
        doc_ids=doc_ids,
        doc_texts=docs.texts,
        query_ids=[query_ids[q] for q in answered],
        query_texts=[queries.texts[q] for q in answered],
        qrels={query_ids[q]: {doc_ids[d]: g for d, g in grades[q].items() if g} for q in answered},
        candidates=candidates,
    )


def _id_order(doc_id: str) -> int:
    return hash_bytes(doc_id.encode("utf-8"))


class _Texts:
    """Distinct texts in order of appearance, with given or made-up ids.

    by_id  a text with an id of its own is another text, whatever it says
    """

    def __init__(self, letter: str, *, by_id: bool = False) -> None:
        self.texts: list[str] = []
        self._by_id = by_id
        self._letter = letter
        self._by_hash: dict[int, int] = {}
        self._given: list[str | None] = []
        self._owner: dict[str, tuple[int, str]] = {}

    def add(self, text: str, given: str | None, where: str, bad: BadRows) -> int | None:
        """Index of the text; None after reporting an id that already stands for another text."""
        key = content_hash(text)
        if given is not None:
            owner, first = self._owner.setdefault(given, (key, where))
            if owner != key:
                bad.report(where, "one text an id", f"{given!r}, the id of another text at {first}")
                return None
            if self._by_id:
                key = hash_bytes(f"id {given}".encode())
        index = self._by_hash.get(key)
        if index is None:
            index = self._by_hash[key] = len(self.texts)
            self.texts.append(text)
            self._given.append(given)
        elif self._given[index] is None:
            self._given[index] = given
        return index

    def ids(self) -> list[str]:
        """One id a text; a made-up one gets trailing underscores where it is taken."""
        ids = []
        for i, given in enumerate(self._given):
            made = f"{self._letter}{i}"
            while given is None and made in self._owner:
                made += "_"
            ids.append(given if given is not None else made)
        return ids
