"""What negatives are mined from: the distinct queries and passages of a data set.

Two texts are the same where content_hash says so: an answer that stands in the data twice, under
two ids, must not become a negative under the second.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.schema import PrepareConfig, SourceConfig
from data.beir import is_corpus, part, read_answers, read_beir, read_corpus, read_queries
from data.formats import content_hash, detect, resolve_split
from data.records import Example, RetrievalSet
from data.rows import in_our_words, is_the_data, read_corpus_rows, read_source


class Texts:
    """Distinct texts by number, in order of appearance; a text without an id gets one in the end.

    number  of every given id, those of equal texts included
    """

    def __init__(self, letter: str) -> None:
        self.texts: list[str] = []
        self.number: dict[str, int] = {}
        self._letter = letter
        self._of: dict[int, int] = {}
        self._given: list[str | None] = []

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str, given: str | None = None) -> int:
        """Number of the text. Raises ValueError for an id that stands for another text."""
        number = self._of.setdefault(content_hash(text), len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
            self._given.append(given)
        elif self._given[number] is None:
            self._given[number] = given
        if given is not None and self.number.setdefault(given, number) != number:
            first = self.texts[self.number[given]]
            raise ValueError(
                f"expected one text an id, found {given!r} with {text[:60]!r} and {first[:60]!r}"
            )
        return number

    def find(self, text: str) -> int | None:
        return self._of.get(content_hash(text))

    @cached_property
    def ids(self) -> list[str]:
        """When all texts are there: the given ids, else <letter><number>."""
        ids = []
        for n, given in enumerate(self._given):
            made = f"{self._letter}{n}"
            while given is None and made in self.number:
                made += "_"
            ids.append(made if given is None else given)
        return ids


class Pool:
    """Queries, passages, and by number of a query:

    positives  passages that answer it, as any row with an equal query has them
    grades     of these, 1 where the data gives none
    own        negatives that the data gives it
    mined      of (query, negative): where an earlier stage found it
    answers    all passages known to answer it: positives, and those of rows that an earlier stage
               dropped, of mine.corpus, and of any split of a BEIR folder that is either
    unseen     texts of answers that are not among the passages, which may hold near copies
    itself     passages that are the query: of its id in a BEIR folder, as searches there leave out
    """

    def __init__(self) -> None:
        self.queries, self.docs = Texts("q"), Texts("d")
        self.answers: list[set[int]] = []
        self.unseen: list[dict[str, None]] = []
        self.itself: list[set[int]] = []
        self._known: list[tuple[str, Sequence[str]]] = []
        self.positives: list[list[int]] = []
        self.grades: list[list[float]] = []
        self.own: list[list[int]] = []
        self.mined: dict[tuple[int, int], dict[str, Any]] = {}

    def add(
        self,
        query: str,
        query_id: str | None,
        positives: Sequence[int],
        negatives: Sequence[int] = (),
        grades: Sequence[float] | None = None,
        mined: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """A row; passages by number."""
        q = self.queries.add(query, query_id)
        if q == len(self.positives):
            for lists in (self.positives, self.grades, self.own):
                lists.append([])
            self.unseen.append({})
            self.answers.append(set())
            self.itself.append(set())
        self.answers[q].update(positives)
        for doc, grade in zip(positives, grades or [1.0] * len(positives), strict=True):
            if doc not in self.positives[q]:
                self.positives[q].append(doc)
                self.grades[q].append(grade)
        self.own[q] += [doc for doc in dict.fromkeys(negatives) if doc not in self.own[q]]
        if mined is not None:
            for doc, entry in zip(negatives, mined, strict=True):
                self.mined.setdefault((q, doc), entry)

    def know(self, query: str, passages: Sequence[str]) -> None:
        """Passages that answer a query, whether or not either is in the pool."""
        self._known.append((query, passages))

    def close(self) -> None:
        """When all rows are there: an answer in one row is no negative by another."""
        for query, passages in self._known:
            q = self.queries.find(query)
            for text in passages if q is not None else ():
                doc = self.docs.find(text)
                if doc is not None:
                    self.answers[q].add(doc)
                else:
                    self.unseen[q][text] = None
        self._known = []
        self.own = [
            [doc for doc in own if doc not in answers]
            for own, answers in zip(self.own, self.answers, strict=True)
        ]

    def as_set(self) -> RetrievalSet:
        """For searchers; without judgements."""
        docs, queries = self.docs, self.queries
        return RetrievalSet("pool", docs.ids, docs.texts, queries.ids, queries.texts, {})


def read_pool(c: PrepareConfig, source: Path) -> Pool:
    """Every query of `source` that has a positive; the passages of `source` and of mine.corpus.

    Raises ValueError for anything wrong with the data.
    """
    pool = Pool()
    try:
        if detect(source) == "beir":
            _read_beir(pool, source, c.split)
        else:
            _read_rows(pool, read_source(c, source))
        if c.mine.corpus is not None:
            _add_corpus(pool, c, source)
        if source != Path(c.data).expanduser():  # an earlier stage may have dropped rows
            _add_known(pool, c, Path(c.data).expanduser())
    except ValueError as error:
        raise ValueError(in_our_words(str(error))) from error
    if not pool.queries.texts:
        raise ValueError(f"data={source}: no query of split {c.split!r} has a relevant passage")
    pool.close()
    return pool


def _read_beir(pool: Pool, root: Path, split: str) -> None:
    data = read_beir(root, str(resolve_split(SourceConfig(root=str(root)), split)))
    for doc_id, text in zip(data.doc_ids, data.doc_texts, strict=True):
        pool.docs.add(text, doc_id)
    for query_id, query in zip(data.query_ids, data.query_texts, strict=True):
        graded = [(d, float(grade)) for d, grade in data.qrels[query_id].items() if grade > 0]
        if graded:
            positives = [pool.docs.number[d] for d, _ in graded]
            pool.add(query, query_id, positives, grades=[grade for _, grade in graded])
    _know_beir(pool, root, _by_id(pool.docs))


def _add_corpus(pool: Pool, c: PrepareConfig, source: Path) -> None:
    """The passages of mine.corpus: those of a BEIR corpus, or of rows, negatives among them."""
    path = Path(str(c.mine.corpus)).expanduser()

    def add(text: str, given: str | None) -> None:
        try:
            pool.docs.add(text, given)
        except ValueError as error:
            raise ValueError(
                f"mine.corpus={path}: {error}, there or in data={source}; an id must be of one text"
                " in both: rename one side, or leave the ids of data unread with"
                " \"columns={positive_id: '', negative_id: ''}\""
            ) from None

    if is_corpus(path):
        for doc_id, text in read_corpus(path):
            add(text, doc_id)
        if path.is_dir():
            _know_beir(pool, path, _by_id(pool.docs))
        return
    for e in read_corpus_rows(c, path):
        pool.know(e.query, e.positives)
        for texts, ids in ((e.positives, e.positive_ids), (e.negatives, e.negative_ids)):
            for n, text in enumerate(texts):
                add(text, ids and ids[n])


def _add_known(pool: Pool, c: PrepareConfig, data: Path) -> None:
    """What the data themselves say, whatever the stages kept of them."""
    if detect(data) == "beir":
        if c.mine.corpus is None or not is_the_data(c, Path(c.mine.corpus).expanduser()):
            _know_beir(pool, data, read_corpus(data))  # else known with its passages
        return
    for e in read_source(c, data):
        pool.know(e.query, e.positives)


def _by_id(docs: Texts) -> Iterator[tuple[str, str]]:
    return ((doc_id, docs.texts[number]) for doc_id, number in docs.number.items())


def _know_beir(pool: Pool, root: Path, docs: Iterable[tuple[str, str]]) -> None:
    """Answers by the judgements of any split of a BEIR folder, and which of its documents a query
    is; both by text, since the pool may know them by other ids.

    docs  (id, text) of its corpus.jsonl
    """
    if part(root, "queries.jsonl") is None:
        return
    numbers = ((query_id, pool.queries.find(text)) for query_id, text in read_queries(root))
    queries = {query_id: q for query_id, q in numbers if q is not None}
    asked: dict[str, list[int]] = {}
    for query_id, doc_id in read_answers(root):
        if query_id in queries:
            asked.setdefault(doc_id, []).append(queries[query_id])
    for doc_id, text in docs:
        for q in asked.get(doc_id, ()):
            pool.know(pool.queries.texts[q], [text])
        number = pool.docs.find(text) if doc_id in queries else None
        if number is not None:
            pool.itself[queries[doc_id]].add(number)


def _read_rows(pool: Pool, examples: Iterable[Example]) -> None:
    for e in examples:
        try:
            positives, negatives = (
                [pool.docs.add(text, i) for text, i in zip(texts, ids or nothing, strict=True)]
                for texts, ids, nothing in (
                    (e.positives, e.positive_ids, [None] * len(e.positives)),
                    (e.negatives, e.negative_ids, [None] * len(e.negatives)),
                )
            )
            query_id = None if e.id == e.where else e.id
            pool.add(e.query, query_id, positives, negatives, e.positive_grades, e.mined)
        except ValueError as error:
            raise ValueError(f"{e.where}: {error}") from None
