"""Retrieval metrics of a search result, by query and on average, through ir-measures.

Shapes: J judged queries, K hits a query.

accuracy@k   share of queries with a relevant document among the first k (trec_eval's success_k)
precision@k  relevant among the first k, over k          recall@k  over all relevant ones
mrr@10       1 / rank of the first relevant document, 0 past rank 10
ndcg@10      linear gains, log2 discount
map@100      average precision over the first 100
mrr, map     the same over the whole list: for rerankers, which order all candidates
Relevant means a grade of at least 1; ndcg@10 uses the grades.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.search import Hits

NAMES = (
    "accuracy@1 accuracy@3 accuracy@5 accuracy@10 precision@1 precision@5 precision@10"
    " recall@5 recall@10 recall@100 mrr@10 ndcg@10 map@100"
).split()
RERANK_NAMES = ("mrr", "map", "ndcg@10")

_FAMILY = {
    "accuracy": "Success",
    "precision": "P",
    "recall": "R",
    "mrr": "RR",
    "ndcg": "nDCG",
    "map": "AP",
}


@dataclass(frozen=True)
class Metrics:
    """query_ids: the judged queries in the order of the hits; per_query: metric name -> float64
    array beside it."""

    query_ids: list[str]
    per_query: dict[str, np.ndarray]
    num_unjudged: int  # queries asked that the qrels do not name: left out of every mean

    @property
    def means(self) -> dict[str, float]:
        return {
            name: float(value_J.mean()) if len(value_J) else 0.0
            for name, value_J in self.per_query.items()
        }


def measure_of(name: str):
    """Our name -> the ir-measures measure, e.g. ndcg@10 -> nDCG@10."""
    import ir_measures

    family, at, cutoff = name.partition("@")
    is_whole = family in ("mrr", "map") and not at
    if family not in _FAMILY or not (is_whole or (cutoff.isdigit() and int(cutoff) >= 1)):
        raise ValueError(
            f"no metric named {name!r}; want one of {', '.join(_FAMILY)} with @k, such as ndcg@10;"
            " mrr and map also without"
        )
    measure = getattr(ir_measures, _FAMILY[family])
    # pytrec_eval has no cut-off for RR; evaluate_hits cuts it
    return measure if family == "mrr" or is_whole else measure @ int(cutoff)


def evaluate_hits(
    hits: Hits, qrels: Mapping[str, Mapping[str, int]], names: tuple[str, ...] | list[str] = NAMES
) -> Metrics:
    """Metrics of every judged query, equal to trec_eval on the written run file.

    qrels  query id -> document id -> grade (>= 1: relevant)
    names  metrics wanted; any cut-off up to the number of hits searched for
    Raises ValueError when a cut-off is greater than that: the metric would be too low.

    A query whose judged documents are all irrelevant, or whose relevant ones were not found,
    counts with 0, and so does one without any hit (trec_eval -c). Queries that are judged but were
    not asked are not looked at. Scores handed to the library are ranks, all different: our order
    is the total order, and no provider of ir-measures can break a tie in its own way (for RR@10 it
    would pick one that does).
    """
    import ir_measures

    most = hits.docs_QK.shape[1]
    for name in names:
        if int(name.partition("@")[2] or 0) > most and most < len(hits.doc_ids):
            raise ValueError(
                f"{name} needs {name.partition('@')[2]} hits a query, the search kept {most};"
                " raise top_k"
            )
    judged = [row for row, query_id in enumerate(hits.query_ids) if qrels.get(query_id)]
    query_ids = [hits.query_ids[row] for row in judged]
    per_query = {name: np.zeros(len(judged)) for name in names}
    if judged:
        doc_ids = hits.doc_ids
        falling = [float(most - rank) for rank in range(most)]
        run = {}
        for query_id, row in zip(query_ids, judged, strict=True):
            found = [doc_ids[n] for n in hits.docs_QK[row].tolist() if n >= 0]
            run[query_id] = dict(zip(found, falling, strict=False))
        names_of: dict[str, list[str]] = {}
        for name in names:  # mrr and mrr@10 are one measure to the library
            names_of.setdefault(str(measure_of(name)), []).append(name)
        place = {query_id: at for at, query_id in enumerate(query_ids)}
        evaluator = ir_measures.pytrec_eval.evaluator(
            [measure_of(of[0]) for of in names_of.values()],
            {query_id: dict(qrels[query_id]) for query_id in query_ids},
        )
        for value in evaluator.iter_calc(run):
            for name in names_of[str(value.measure)]:
                per_query[name][place[value.query_id]] = value.value
    for name, value_J in per_query.items():
        if name.startswith("mrr@"):
            value_J[value_J < 1 / int(name[4:])] = 0.0
    return Metrics(query_ids, per_query, len(hits.query_ids) - len(judged))


def names_up_to(k: int) -> list[str]:
    """The metrics that k hits a query are enough for."""
    return [name for name in NAMES if int(name.partition("@")[2]) <= k]
