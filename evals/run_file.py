"""TREC run files: `query Q0 document rank score tag`, one line a hit.

Shapes: K hits a query.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.records import RetrievalSet, short
from evals.search import Hits, descending_ids

log = logging.getLogger(__name__)


def run_lines(hits: Hits, tag: str) -> Iterator[str]:
    """Lines of a TREC run file: `query Q0 document rank score tag`, best first.

    Nine significant digits give every float32 back, so trec_eval, which sorts by score and then by
    id, reads our order. Raises ValueError as check_ids does.
    """
    check_ids(hits)
    for row, query_id in enumerate(hits.query_ids):
        for rank, (doc_id, score) in enumerate(hits.of(row), 1):
            yield f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n"


def check_ids(of: Hits | RetrievalSet) -> None:
    """Raise ValueError on an id that is empty or holds white space: a run file cannot carry it."""
    for what, ids in (("query", of.query_ids), ("document", of.doc_ids)):
        for one in ids:
            if one.split() != [one]:
                raise ValueError(
                    f"{what} id {one!r} cannot stand in a TREC run file: ids must be free of white"
                    " space;"
                    " rename it, or leave out= away to have the metrics alone"
                )


def read_run(path: Path, data: RetrievalSet, k: int) -> Hits:
    """The k best documents of each query of `data` by a run file, in the total order: score as
    float32, then id; the rank column is not read, as trec_eval does not read it.

    Raises ValueError as read_run_scores does.
    """
    found = read_run_scores(path, data)
    place_N = np.argsort(descending_ids(data.doc_ids))
    scores_QK = np.full((len(found), k), -np.inf, np.float32)
    docs_QK = np.full((len(found), k), -1, np.int64)
    for row, of in enumerate(found.values()):
        doc_n, score_n = np.array(list(of), np.int64), np.array(list(of.values()), np.float32)
        best_K = np.lexsort((place_N[doc_n], -score_n))[:k]
        docs_QK[row, : len(best_K)], scores_QK[row, : len(best_K)] = doc_n[best_K], score_n[best_K]
    return Hits(list(data.query_ids), list(data.doc_ids), scores_QK, docs_QK)


def read_run_scores(path: Path, data: RetrievalSet) -> dict[str, dict[int, float]]:
    """Query id -> number of each document that a run file lists -> its score, for all of `data`.

    Queries that `data` does not have are left out and counted in the log, and so are queries of
    `data` without a line: they have no hits. Where ids are shared, a document whose id is the
    query's own is left out, as in every other search.
    Raises ValueError, naming the line, for a line of another form, a score that is no finite
    number, a document that `data` does not have or that a query lists twice; and where no query is
    known.
    """
    number_of = {doc_id: n for n, doc_id in enumerate(data.doc_ids)}
    found: dict[str, dict[int, float]] = {query_id: {} for query_id in data.query_ids}
    unknown: dict[str, None] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                fields, where = line.split(), f"{path}:{number}"
                if len(fields) != 6:
                    raise ValueError(
                        f"{where}: expected a line of a TREC run file, query Q0 document rank score"
                        f" tag, found {len(fields)} fields: {short(line.strip())}"
                    )
                query_id, _, doc_id, _, score, _ = fields
                if data.shares_ids and doc_id == query_id:
                    continue
                if query_id not in found:
                    unknown[query_id] = None
                    continue
                if doc_id not in number_of:
                    raise ValueError(
                        f"{where}: document {doc_id!r} is not in the data; the run file is of"
                        " another corpus"
                    )
                doc = number_of[doc_id]
                if doc in found[query_id]:
                    raise ValueError(f"{where}: query {query_id!r} has document {doc_id!r} twice")
                found[query_id][doc] = _score(score, where)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: expected a TREC run file in UTF-8, found {e.reason}") from e
    num_empty = sum(not of for of in found.values())
    if num_empty == len(found):
        raise ValueError(
            f"{path}: none of its queries ({', '.join(list(unknown)[:3]) or 'it has none'}) is"
            " asked in the data; same split?"
        )
    if unknown or num_empty:
        log.warning(
            "%s: %d of its queries are not in the data; %d queries of the data have no line in it",
            path, len(unknown), num_empty,
        )  # fmt: skip
    return found


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: expected a finite score in field 5, found {text!r}")
    return score
