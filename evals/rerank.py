"""Candidates of a query put in order: by a cross-encoder, a retriever, or chance; grouped metrics.

Shapes: P pairs, L labels, Q queries, K hits a query, N documents, D embedding.
"""

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from data.batches import chunks
from data.pairs import PairTemplate, pack_pairs, tokenise_plain
from data.records import RerankSet, RetrievalSet
from evals.bm25 import Bm25
from evals.metrics import RERANK_NAMES, evaluate_hits
from evals.retrieval import Scored, encode_sets
from evals.search import Hits, descending_ids, truncate
from models.reranker import Reranker
from models.towers import Towers
from models.transformer import ready_to_encode
from runtime.device import autocast_for, pick_precision, tokens_at_once

Candidates = Mapping[str, Sequence[str]]  # query id -> document ids
Scores = dict[str, np.ndarray]  # query id -> float32 score of each of its candidates

Prompts = tuple[str | None, str | None]  # of query and passage

MIN_HITS = 10  # columns of Hits, so that metrics@10 are to be had of shorter lists
NUM_WARM_UP = 2  # queries before the latency is taken


def score_pairs(reranker: Reranker, *texts_and_pairs, **options) -> np.ndarray:
    """Ranking score of each pair, (P,) float32: the logit, or the expected label of several.
    Arguments as of pair_logits."""
    logit_PL = pair_logits(reranker, *texts_and_pairs, **options)
    return reranker.score(torch.from_numpy(logit_PL)).numpy()


@torch.no_grad()
def pair_logits(
    reranker: Reranker,
    queries: Sequence[str],
    passages: Sequence[str],
    pairs: np.ndarray | Sequence[tuple[int, int]],
    *,
    precision: str = "auto",
    batch_tokens: int = 0,
    progress: str = "",
    prompts: Prompts = (None, None),
) -> np.ndarray:
    """Logits of each pair, (P, L) float32.

    pairs         (P, 2) numbers of a query and of a passage
    precision     auto (bf16 where the hardware has it) | fp32 | bf16
    batch_tokens  tokens scored at once; 0: what fits a CPU's cache, or fills a GPU
    progress      label of a progress bar; empty for none
    prompts       of query and passage; None: the model's own
    Each distinct text is tokenised once and each distinct pair scored once, in an order that
    follows from the texts alone: the same pairs get the same bits however they are asked.
    Raises ValueError where a score is not finite.
    """
    pairs_P2 = np.asarray(pairs, np.int64).reshape(-1, 2)
    if not len(pairs_P2):
        return np.zeros((0, reranker.width), np.float32)
    spec, tokenizer = reranker.spec, reranker.tokenizer
    query_texts, query_P = _sorted_texts(queries, pairs_P2[:, 0])
    passage_texts, passage_P = _sorted_texts(passages, pairs_P2[:, 1])
    own = (spec.query_prompt, spec.passage_prompt)
    prompts = tuple(o if p is None else p for p, o in zip(prompts, own, strict=True))
    query_tokens = tokenise_plain(tokenizer, query_texts, prompts[0], spec.max_length)
    passage_tokens = tokenise_plain(tokenizer, passage_texts, prompts[1], spec.max_length)
    key_U, from_P = np.unique(query_P * len(passage_texts) + passage_P, return_inverse=True)
    query_U, passage_U = np.divmod(key_U, len(passage_texts))
    template = PairTemplate.of(tokenizer)
    length_U = np.array([len(t) for t in query_tokens])[query_U]
    length_U += np.array([len(t) for t in passage_tokens])[passage_U] + template.num_special
    device = next(reranker.parameters()).device
    precision = pick_precision(precision, device)
    batch_tokens = batch_tokens or tokens_at_once(precision, device)
    autocast = autocast_for(precision, device)
    was_training = reranker.training
    reranker.eval()
    logit_UL = np.empty((len(key_U), reranker.width), np.float32)
    with (
        tqdm(
            total=len(key_U), desc=progress, unit="pair", disable=not progress, leave=False
        ) as bar,
        autocast(),
        ready_to_encode(reranker),
    ):
        for rows in chunks(np.minimum(length_U, spec.max_length), batch_tokens):
            joined = [
                template.join(query_tokens[query_U[u]], passage_tokens[passage_U[u]],
                              spec.max_length)
                for u in rows
            ]  # fmt: skip
            logit_UL[rows] = reranker(pack_pairs(joined, device)).float().cpu().numpy()
            bar.update(len(rows))
    reranker.train(was_training)
    if not np.isfinite(logit_UL).all():
        bad, label = np.argwhere(~np.isfinite(logit_UL))[0].tolist()
        raise ValueError(
            f"the reranker's score of query {query_texts[query_U[bad]][:60]!r} is"
            f" {logit_UL[bad, label]}; its weights are broken, or precision={precision} is too"
            " narrow"
        )
    return logit_UL[from_P.reshape(-1)]


def _sorted_texts(texts: Sequence[str], number_P: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(the distinct texts that are used, sorted; number of each pair's text among them)."""
    used, at_P = np.unique(number_P, return_inverse=True)
    found = [texts[i] for i in used.tolist()]
    ordered = sorted(set(found))
    place = {text: i for i, text in enumerate(ordered)}
    return ordered, np.array([place[text] for text in found], np.int64)[at_P.reshape(-1)]


# ---------------------------------------------------------------------- scores of candidates by id


def reranker_scores(
    reranker: Reranker, data: RetrievalSet, candidates: Candidates, **options
) -> Scores:
    """The cross-encoder's scores of every query's candidates; options as in score_pairs."""
    return scores_of(reranker, candidates, candidate_logits(reranker, data, candidates, **options))


def candidate_logits(
    reranker: Reranker, data: RetrievalSet, candidates: Candidates, **options
) -> np.ndarray:
    """(P, L) logits of all labels of every query's candidates, end to end; options as in
    score_pairs."""
    query_P, doc_P, _ = _numbered(data, candidates)
    pairs_P2 = np.stack([query_P, doc_P], axis=1)
    return pair_logits(reranker, data.query_texts, data.doc_texts, pairs_P2, **options)


def scores_of(reranker: Reranker, candidates: Candidates, logit_PL: np.ndarray) -> Scores:
    """Ranking scores from the logits of candidate_logits."""
    score_P = reranker.score(torch.from_numpy(logit_PL)).numpy()
    ends = np.cumsum([len(ids) for ids in candidates.values()])
    return dict(zip(candidates, np.split(score_P, ends[:-1]), strict=True))


def retriever_scores(
    towers: Towers,
    data: RetrievalSet,
    candidates: Candidates,
    *,
    dim: int | None = None,
    precision: str = "auto",
    batch_tokens: int = 0,
    progress: str = "",
    prompts: Prompts = (None, None),
) -> Scores:
    """Inner products of query and candidates; texts of no query and of no candidate stay out."""
    query_P, doc_P, ends = _numbered(data, candidates)
    queries, query_P = np.unique(query_P, return_inverse=True)
    docs, doc_P = np.unique(doc_P, return_inverse=True)
    asked = RetrievalSet(
        data.name,
        [data.doc_ids[n] for n in docs], [data.doc_texts[n] for n in docs],
        [data.query_ids[n] for n in queries], [data.query_texts[n] for n in queries], {},
    )  # fmt: skip
    options = {"precision": precision, "batch_tokens": batch_tokens, "progress": progress}
    embedded = encode_sets(towers, {"": asked}, prompts={"": prompts}, **options)
    q_QD, p_ND = embedded[""]
    if dim is not None:
        q_QD, p_ND = (truncate(torch.from_numpy(x), dim).numpy() for x in (q_QD, p_ND))
    # row by row, not as a matrix product: equal vectors must have equal scores
    scores = [
        (p_ND[doc_P[low:high]] * q_QD[query_P[low:high]]).sum(axis=1)
        for low, high in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return dict(zip(candidates, scores, strict=True))


def bm25_scores(data: RetrievalSet, candidates: Candidates) -> Scores:
    """BM25 with the word counts of all of data's documents; 0 where no word is shared."""
    query_P, doc_P, ends = _numbered(data, candidates)
    score_P = Bm25(data).pair_scores([data.query_texts[q] for q in query_P.tolist()], doc_P)
    return dict(zip(candidates, np.split(score_P, ends[:-1]), strict=True))


def random_scores(candidates: Candidates, seed: int = 0) -> Scores:
    """A random order, a function of seed and ids alone."""
    scores = {}
    for query_id, ids in candidates.items():
        drawn = np.random.default_rng([seed, zlib.crc32(query_id.encode())]).random(len(ids))
        value_of = dict(zip(sorted(ids), drawn.astype(np.float32), strict=True))
        scores[query_id] = np.array([value_of[doc_id] for doc_id in ids], np.float32)
    return scores


def _numbered(
    data: RetrievalSet, candidates: Candidates
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(query number, document number) of each candidate, and where each query's candidates end."""
    row_of = {query_id: row for row, query_id in enumerate(data.query_ids)}
    number_of = {doc_id: n for n, doc_id in enumerate(data.doc_ids)}
    counts = np.array([len(ids) for ids in candidates.values()], np.int64)
    query_P = np.repeat(np.array([row_of[q] for q in candidates], np.int64), counts)
    doc_P = np.array([number_of[d] for ids in candidates.values() for d in ids], np.int64)
    return query_P, doc_P, np.cumsum(counts).tolist()


# -------------------------------------------------------------------------------- hits and metrics


def candidate_hits(data: RerankSet, scores: Mapping[str, np.ndarray]) -> Hits:
    """Every query's candidates, all of them, in the total order of evals/search.py."""
    assert data.candidates is not None
    most = max([MIN_HITS, *map(len, data.candidates.values())])
    docs_QK = np.full((len(data.query_ids), most), -1, np.int64)
    number_of = {doc_id: n for n, doc_id in enumerate(data.doc_ids)}
    for row, query_id in enumerate(data.query_ids):
        ids = data.candidates.get(query_id, [])
        docs_QK[row, : len(ids)] = [number_of[doc_id] for doc_id in ids]
    empty_QK = np.full(docs_QK.shape, -np.inf, np.float32)
    return reordered(
        Hits(list(data.query_ids), list(data.doc_ids), empty_QK, docs_QK), most, scores
    )


def evaluate_candidates(
    data: RerankSet, scores: Mapping[str, np.ndarray], names: Sequence[str] = RERANK_NAMES
) -> Scored:
    """Hits and grouped metrics of the candidates, whole lists.

    scores  query id -> score of each of data.candidates[query id]
    A relevant document that is no candidate counts as not found.
    """
    hits = candidate_hits(data, scores)
    return Scored(hits, evaluate_hits(hits, data.qrels, list(names)))


def reordered(hits: Hits, k: int, scores: Mapping[str, np.ndarray]) -> Hits:
    """The first k hits of each query in the order of `scores`, ties by id as everywhere; the others
    keep their order below them, with scores that say so.

    scores  query id -> score of each of its first k hits, in their order
    """
    docs_QK, scores_QK = hits.docs_QK.copy(), hits.scores_QK.copy()
    place_N = np.argsort(descending_ids(hits.doc_ids))
    for row, query_id in enumerate(hits.query_ids):
        num_hits = int((docs_QK[row] >= 0).sum())
        num = min(k, num_hits)
        if not num:
            continue
        score_K, first_K = np.asarray(scores[query_id], np.float32), docs_QK[row, :num]
        assert score_K.shape == (num,), (query_id, score_K.shape, num)
        order_K = np.lexsort((place_N[first_K], -score_K))
        docs_QK[row, :num], scores_QK[row, :num] = first_K[order_K], score_K[order_K]
        below = np.floor(score_K.min()) - 1
        scores_QK[row, num:num_hits] = below - np.arange(num_hits - num)
    return replace(hits, docs_QK=docs_QK, scores_QK=scores_QK)


def rerank_hits(
    reranker: Reranker, data: RetrievalSet, hits: Hits, k: int, **options
) -> tuple[Hits, Scores]:
    """The first k hits of each query reordered by the cross-encoder, the rest kept below; and the
    scores. Options as in score_pairs.
    """
    scores = reranker_scores(reranker, data, hits.ids_by_query(k), **options)
    return reordered(hits, k, scores), scores


def latency_ms(
    reranker: Reranker,
    data: RetrievalSet,
    candidates: Candidates,
    *,
    count: int,
    seed: int = 0,
    **options,
) -> dict[str, float]:
    """Milliseconds to score the candidates of one query, one query at a time, tokenising included.

    count  queries timed, drawn at random among those with candidates
    """
    asked = [query_id for query_id, ids in candidates.items() if len(ids)]
    drawn = np.random.default_rng(seed).permutation(len(asked))[:count]
    query_P, doc_P, ends = _numbered(data, {asked[at]: candidates[asked[at]] for at in drawn})
    pairs = np.split(np.stack([query_P, doc_P], axis=1), ends[:-1])
    taken = []
    for i, pairs_K2 in enumerate([*pairs[:NUM_WARM_UP], *pairs] if ends else []):
        began = time.perf_counter()
        score_pairs(reranker, data.query_texts, data.doc_texts, pairs_K2, **options)
        if i >= min(NUM_WARM_UP, len(drawn)):
            taken.append(1000 * (time.perf_counter() - began))
    return {
        "median_ms": float(np.median(taken)) if taken else 0.0,
        "p90_ms": float(np.percentile(taken, 90)) if taken else 0.0,
        "queries": len(taken),
        "passages": float(np.mean([len(candidates[asked[at]]) for at in drawn])) if taken else 0.0,
    }
