"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.

Training examples are served through an id -> byte offset index, so that a corpus larger than memory
works; an evaluation set holds its corpus, because search needs all of it.
"""

import gzip
import json
import logging
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.records import (
    GZIP_DAMAGE,
    BadRows,
    Example,
    HashIndex,
    RetrievalSet,
    as_id,
    as_score,
    hash_bytes,
    join_title,
    kind_of,
    open_bytes,
    parse_object,
    read_lines,
    read_rows,
    short,
    text_problem,
)

log = logging.getLogger(__name__)


def part(root: Path, name: str) -> Path | None:
    """root/name or root/name.gz, whichever exists."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def is_beir(root: Path) -> bool:
    return part(root, "corpus.jsonl") is not None and (
        part(root, "queries.jsonl") is not None or (root / "qrels").is_dir()
    )


def beir_splits(root: Path) -> list[str]:
    """Names of qrels/*.tsv; train, dev, test first."""
    names = {p.name.removesuffix(".gz").removesuffix(".tsv") for p in root.glob("qrels/*.tsv*")}
    order = {"train": 0, "dev": 1, "test": 2}
    return sorted(names, key=lambda n: (order.get(n, 3), n))


def beir_paths(root: Path, split: str) -> tuple[Path, Path, Path]:
    """corpus, queries and qrels of a split. Raises ValueError for a part that is not there."""
    paths = [part(root, n) for n in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")]
    corpus, queries, qrels = paths
    if corpus is None or queries is None:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:12])
        raise ValueError(f"{root}: expected corpus.jsonl, queries.jsonl and qrels/, found {found}")
    if qrels is None:
        splits = ", ".join(beir_splits(root)) or "none"
        raise ValueError(
            f"{root}: no split {split!r} (no qrels/{split}.tsv); splits at hand: {splits}"
        )
    return corpus, queries, qrels


def _read_items(
    path: Path, bad: BadRows, *, has_title: bool, file: IO[bytes] | None = None
) -> Iterator[tuple[int, int, str, str]]:
    """(line number, byte offset, id, text) of corpus.jsonl or queries.jsonl."""
    is_empty = True
    for number, offset, line in read_rows(path, bad, file):
        is_empty = False
        where = f"{path}:{number}"
        row = parse_object(line, where, bad)
        if row is None:
            continue
        item = _item(row, where, bad, has_title=has_title)
        if item is not None:
            yield number, offset, *item
    if is_empty:
        raise ValueError(f"{path}: expected JSON objects with _id and text, found an empty file")


def _item(
    row: dict[str, Any], where: str, bad: BadRows, *, has_title: bool
) -> tuple[str, str] | None:
    """(id, text) of one object; None after reporting what is wrong with it."""
    for field in ("_id", "text"):
        if field not in row:
            bad.report(where, f"a field {field!r}", f"fields {', '.join(row) or '(none)'}")
            return None
    item_id = as_id(row["_id"])
    if item_id is None:
        bad.report(where, "'_id' to be text or a whole number", kind_of(row["_id"]))
        return None
    title = row.get("title") if has_title else None
    if title is not None and not isinstance(title, str):
        bad.report(where, "'title' to be text", kind_of(title))
        return None
    text = row["text"]
    if isinstance(text, str):
        text = join_title(title, text) if title else text.strip() if has_title else text
    problem = text_problem(text)
    if problem is not None:
        bad.report(where, "'text' to be text that is not empty", problem)
        return None
    return item_id, text


class _Items:
    """corpus.jsonl or queries.jsonl by id, read from disk when asked for; 20 to 40 bytes each."""

    def __init__(self, path: Path, bad: BadRows, *, has_title: bool) -> None:
        self.path = path
        self._has_title = has_title
        self._file = _seekable(path)
        self._index = HashIndex()
        for number, offset, item_id, _ in _read_items(
            path, bad, has_title=has_title, file=self._file
        ):
            earlier = self._index.add(_id_key(item_id), offset)
            if earlier is not None:
                line = self._line_at(earlier)
                bad.report(
                    f"{path}:{number}",
                    "an id not used before",
                    f"{item_id!r}, the id of line {line}",
                )

    def find(self, item_id: str) -> int | None:
        """Byte offset of the item, None for an unknown id."""
        return self._index.get(_id_key(item_id))

    def read(self, offset: int) -> tuple[str, str]:
        """(id, text) of the item at a byte offset given by find()."""
        self._file.seek(offset)
        row = json.loads(self._file.readline().decode("utf-8-sig"))
        item = _item(row, str(self.path), BadRows(), has_title=self._has_title)
        assert item is not None  # it was checked when the index was built
        return item

    def close(self) -> None:
        self._file.close()

    def _line_at(self, offset: int) -> int:
        return next(number for number, at, _ in read_lines(self.path) if at == offset)


class BeirTexts:
    """The texts of a BEIR folder by id, for rows that name them by id; read from disk when asked
    for.

    folder  has corpus.jsonl and, where rows name queries by id, queries.jsonl
    Raises ValueError for a folder that is not there or has no corpus.jsonl.
    """

    def __init__(self, folder: str | Path, bad: BadRows) -> None:
        self.folder, self._bad = Path(folder).expanduser(), bad
        if part(self.folder, "corpus.jsonl") is None:
            is_there = self.folder.is_dir()
            found = sorted(p.name for p in self.folder.iterdir())[:12] if is_there else []
            raise ValueError(
                f"data.texts={folder}: expected a folder with corpus.jsonl (and queries.jsonl),"
                f" found {', '.join(found) or 'none'}"
            )
        self._open: dict[str, _Items] = {}
        self._last: tuple[str, str, str] | None = None

    def text(self, name: str, item_id: str) -> str | None:
        """Of an id of corpus.jsonl or queries.jsonl (`name`); None for an unknown id."""
        if self._last is not None and self._last[:2] == (name, item_id):
            return self._last[2]
        items = self._open.get(name)
        if items is None:
            path = part(self.folder, name)
            if path is None:
                raise ValueError(f"data.texts={self.folder}: expected {name}, found none")
            items = self._open[name] = _Items(path, self._bad, has_title=name == "corpus.jsonl")
        at = items.find(item_id)
        if at is None:
            return None
        text = items.read(at)[1]
        if name == "queries.jsonl":
            self._last = (name, item_id, text)  # rows of a query follow each other
        return text

    def close(self) -> None:
        for items in self._open.values():
            items.close()


def _id_key(item_id: str) -> int:
    return hash_bytes(item_id.encode("utf-8"))


def _seekable(path: Path) -> IO[bytes]:
    """`path` open for reading at any place; a gzip file is unpacked into a temporary one first."""
    source = open_bytes(path)
    if not isinstance(source, gzip.GzipFile):
        return source
    copy = tempfile.TemporaryFile()
    try:
        with source:
            shutil.copyfileobj(source, copy)
    except GZIP_DAMAGE as e:
        copy.close()
        raise ValueError(f"{path}: expected a whole gzip file, found damage: {e}") from e
    copy.seek(0)
    return copy


def _read_qrels(path: Path, bad: BadRows) -> Iterator[tuple[int, str, str, int]]:
    """(line number, query id, document id, score); a header line is recognised and left out."""
    is_empty = True
    for number, _, line in read_rows(path, bad):
        fields = line.split("\t")
        where = f"{path}:{number}"
        is_first, is_empty = is_empty, False
        if len(fields) != 3:
            wanted = "3 tab-separated fields (query-id, corpus-id, score)"
            bad.report(where, wanted, f"{len(fields)}: {short(line)}")
            continue
        query_id, doc_id, score_text = (f.strip() for f in fields)
        score = as_score(score_text)
        if score is None or score != int(score):
            if not (
                is_first and score is None and score_text.lower() in ("score", "relevance", "label")
            ):
                bad.report(where, "a whole number as score", short(score_text))
            continue
        yield number, query_id, doc_id, int(score)
    if is_empty:
        raise ValueError(
            f"{path}: expected rows of query-id, corpus-id, score, found an empty file"
        )


def read_answers(root: Path) -> Iterator[tuple[str, str]]:
    """(query id, document id) of everything judged relevant, in any split."""
    for split in beir_splits(root):
        qrels = beir_paths(root, split)[2]
        for _, query_id, doc_id, grade in _read_qrels(qrels, BadRows("skip")):
            if grade > 0:
                yield query_id, doc_id


def read_queries(root: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of queries.jsonl, rows that cannot be read left out."""
    queries = part(root, "queries.jsonl")
    assert queries is not None, root
    for _, _, query_id, text in _read_items(queries, BadRows("skip"), has_title=False):
        yield query_id, text


def is_corpus(path: Path) -> bool:
    """Whether it is a folder with a corpus.jsonl, or a file whose first row is a document of one.

    Raises ValueError for a path that does not exist.
    """
    if path.is_dir():
        return part(path, "corpus.jsonl") is not None
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; want a BEIR folder, or rows of passages")
    first = next((line for _, _, line in read_lines(path)), b"")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "_id" in row and "text" in row


def read_corpus(path: Path, bad: BadRows | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents of what is_corpus."""
    corpus = part(path, "corpus.jsonl") if path.is_dir() else path
    assert corpus is not None, path
    for _, _, doc_id, text in _read_items(corpus, bad or BadRows(), has_title=True):
        yield doc_id, text


def read_beir(
    root: str | Path,
    split: str,
    bad: BadRows | None = None,
    *,
    name: str = "",
    max_docs: int | None = None,
) -> RetrievalSet:
    """A BEIR folder as a RetrievalSet: the whole corpus, the queries judged in qrels/<split>.tsv.

    split     name of the qrels file
    name      of the set; default the folder's name
    max_docs  read only that many documents (a quick look; qrels to others are left out)
    Grades are kept, 0 included. Queries that other splits judge are left out, those that none does
    are left out and counted. Raises ValueError for a missing part, an unknown split or (unless
    `bad` skips) a bad row.
    """
    root = Path(root)
    bad = bad if bad is not None else BadRows()
    corpus, queries, qrels_path = beir_paths(root, split)
    doc_lines: dict[str, int] = {}
    doc_texts: list[str] = []
    for number, _, doc_id, text in _read_items(corpus, bad, has_title=True):
        if max_docs is not None and len(doc_texts) == max_docs:
            break
        if doc_id in doc_lines:
            found = f"{doc_id!r}, the id of line {doc_lines[doc_id]}"
            bad.report(f"{corpus}:{number}", "an id not used before", found)
            continue
        doc_lines[doc_id] = number
        doc_texts.append(text)
    query_lines: dict[str, int] = {}
    all_texts: dict[str, str] = {}
    for number, _, query_id, text in _read_items(queries, bad, has_title=False):
        if query_id in query_lines:
            found = f"{query_id!r}, the id of line {query_lines[query_id]}"
            bad.report(f"{queries}:{number}", "an id not used before", found)
            continue
        query_lines[query_id] = number
        all_texts[query_id] = text
    qrels: dict[str, dict[str, int]] = {}
    unjudged = set(all_texts)
    for number, query_id, doc_id, score in _read_qrels(qrels_path, bad):
        where = f"{qrels_path}:{number}"
        unjudged.discard(query_id)
        if query_id not in all_texts:
            bad.report(where, f"a query id of {queries.name}", repr(query_id))
        elif doc_id not in doc_lines:
            if max_docs is None:
                bad.report(where, f"a document id of {corpus.name}", repr(doc_id))
        elif qrels.setdefault(query_id, {}).setdefault(doc_id, score) != score:
            expected = f"one score for query {query_id!r} and document {doc_id!r}"
            bad.report(where, expected, f"{score} after {qrels[query_id][doc_id]}")
    if not qrels:
        raise ValueError(f"{qrels_path}: expected judged queries, found none that can be used")
    query_ids = [q for q in all_texts if q in qrels]
    num_own = sum(qrels[q].get(q, 0) > 0 for q in query_ids)
    if num_own:
        log.warning(
            "%s: %d queries are answered by the document that has their own id, which searches"
            " leave out, as BEIR does; if ids of queries and documents are apart, rename one side",
            qrels_path,
            num_own,
        )
    for other in beir_splits(root) if unjudged else ():
        path = part(root, f"qrels/{other}.tsv")
        if other != split and path is not None:
            # first field alone: what else is wrong with rows that are not asked for is no matter
            try:
                for _, _, line in read_rows(path, BadRows("skip")):
                    unjudged.discard(line.split("\t")[0].strip())
            except ValueError as e:
                log.info("%s: not read for the count of unjudged queries: %s", path, e)
    return RetrievalSet(
        name=name or root.resolve().name,
        doc_ids=list(doc_lines),
        doc_texts=doc_texts,
        query_ids=query_ids,
        query_texts=[all_texts[q] for q in query_ids],
        qrels={q: qrels[q] for q in query_ids},
        shares_ids=True,
        num_unjudged=len(unjudged),
    )


def read_beir_examples(
    root: str | Path, split: str, bad: BadRows | None = None, *, groups: bool = False
) -> Iterator[Example]:
    """One Example a query with a relevant document, in the order of qrels/<split>.tsv.

    groups  for rerankers: every judged query, documents judged 0 or less as its negatives, grades
            as positive_grades
    Memory: about 30 bytes a document, query and qrels row; texts are read from disk an example at a
    time. Documents judged 0 or less are never positives. positive_scores holds the grades where
    they are not all 1.
    """
    bad = bad if bad is not None else BadRows()
    corpus, queries, qrels_path = beir_paths(Path(root), split)
    docs = _Items(corpus, bad, has_title=True)
    asked = _Items(queries, bad, has_title=False)
    try:
        query_E, doc_E, score_E, line_E = (array("q") for _ in range(4))
        for number, query_id, doc_id, score in _read_qrels(qrels_path, bad):
            query, doc = asked.find(query_id), docs.find(doc_id)
            if query is None:
                bad.report(
                    f"{qrels_path}:{number}", f"a query id of {queries.name}", repr(query_id)
                )
            elif doc is None:
                bad.report(
                    f"{qrels_path}:{number}", f"a document id of {corpus.name}", repr(doc_id)
                )
            else:
                for column, value in zip(
                    (query_E, doc_E, score_E, line_E), (query, doc, score, number), strict=True
                ):
                    column.append(value)
        columns = [np.array(c, dtype=np.int64) for c in (query_E, doc_E, score_E, line_E)]
        columns = _without_repeats(*columns, qrels_path, bad)
        yield from _grouped(*columns, docs, asked, qrels_path, groups)
    finally:
        docs.close()
        asked.close()


def _without_repeats(
    query_E: np.ndarray,
    doc_E: np.ndarray,
    score_E: np.ndarray,
    line_E: np.ndarray,
    path: Path,
    bad: BadRows,
) -> list[np.ndarray]:
    """Leaves out later rows of a (query, document) pair; one with another score is a bad row."""
    order_E = np.lexsort((line_E, doc_E, query_E))
    is_repeat_E = np.zeros(len(order_E), dtype=bool)
    before, after = order_E[:-1], order_E[1:]
    is_repeat_E[after] = (query_E[before] == query_E[after]) & (doc_E[before] == doc_E[after])
    for one, two in zip(before, after, strict=True) if is_repeat_E.any() else ():
        if is_repeat_E[two] and score_E[one] != score_E[two]:
            expected = f"one score a query and document, as on line {line_E[one]} ({score_E[one]})"
            bad.report(f"{path}:{line_E[two]}", expected, f"score {score_E[two]}")
    return [c[~is_repeat_E] for c in (query_E, doc_E, score_E, line_E)]


def _grouped(
    query_E: np.ndarray,
    doc_E: np.ndarray,
    score_E: np.ndarray,
    line_E: np.ndarray,
    docs: _Items,
    asked: _Items,
    path: Path,
    groups: bool,
) -> Iterator[Example]:
    _, first_Q, group_E = np.unique(query_E, return_index=True, return_inverse=True)
    order_E = np.argsort(
        first_Q[group_E], kind="stable"
    )  # rows of a query side by side, first seen first
    ends = np.flatnonzero(np.diff(query_E[order_E])) + 1
    num_unanswered = 0
    for rows in np.split(order_E, ends) if len(order_E) else ():
        relevant = rows[score_E[rows] > 0]
        if not len(relevant) and not groups:
            num_unanswered += 1
            continue
        query_id, query = asked.read(int(query_E[rows[0]]))
        read = [docs.read(int(doc_E[r])) for r in relevant]
        others = [docs.read(int(doc_E[r])) for r in rows[score_E[rows] <= 0]] if groups else []
        grades = [float(score_E[r]) for r in relevant]
        example = Example(
            query=query,
            positives=[text for _, text in read],
            negatives=[text for _, text in others],
            where=f"{path}:{line_E[rows[0]]}",
            id=query_id,
            positive_ids=[doc_id for doc_id, _ in read],
        )
        if groups:
            example.positive_grades = grades
            example.negative_ids = [doc_id for doc_id, _ in others]
        elif any(g != 1 for g in grades):
            example.positive_scores = grades
        yield example
    if num_unanswered:
        log.info("%s: left out %d queries without a relevant document", path, num_unanswered)
