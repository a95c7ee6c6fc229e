"""Where a query's hard negatives may come from: a model's nearest passages, BM25 or a run file.

A source gives the best passages of each query, best first in the one total order (score
descending, then id descending by bytes), and the score of any single pair.

Shapes: Q queries, B of them asked at once, N passages, D embedding, K candidates a query, P (query,
passage) pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from data.cache import digest_of
from data.pool import Pool
from data.records import RetrievalSet
from data.teacher import Encoder
from evals.bm25 import Bm25, bm25_hits
from evals.run_file import read_run_scores
from evals.search import descending_ids, search

# Encoded, kept in the cache and searched at once: what a killed run encodes again at most, and what
# a search holds in memory beside the candidates
PART_TEXTS = 16384
BLOCK_PAIRS = 1 << 16
ALL = slice(None)


class CandidateSource(Protocol):
    def best(self, k: int, queries: slice = ALL) -> tuple[np.ndarray, np.ndarray]:
        """(docs_BK int64, scores_BK float32), best first; -1 and -inf where there is none. What
        other queries are asked changes no bit of a query's."""

    def pair_scores(self, query_P: np.ndarray, doc_P: np.ndarray) -> np.ndarray:
        """float32 score of each pair."""


class ModelSource:
    """Inner products of embeddings, exactly searched.

    parts  embeddings of the passages, PART_TEXTS at a time: files need not be in memory together
    """

    def __init__(
        self, pool: Pool, q_QD: np.ndarray, parts: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self.pool, self.q_QD, self.parts, self.device = pool, q_QD, parts, device

    @classmethod
    def of(cls, pool: Pool, encoder: Encoder, cache_dir: Path) -> "ModelSource":
        """Encoded now, or read from the cache by content of the model and of the texts."""
        queries = cached_embeddings(encoder, pool.queries.texts, "query", cache_dir)
        parts = cached_embeddings(encoder, pool.docs.texts, "passage", cache_dir)
        encoder.close()
        return cls(pool, np.concatenate(queries), parts, encoder.device)

    @cached_property
    def _order(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """(place of each passage in the order of ids, that order within each part)."""
        ids = self.pool.docs.ids
        lows = range(0, len(ids), PART_TEXTS)
        parts = [descending_ids(ids[low : low + PART_TEXTS]) for low in lows]
        return np.argsort(descending_ids(ids)), parts

    def best(self, k: int, queries: slice = ALL) -> tuple[np.ndarray, np.ndarray]:
        place_N, orders = self._order
        q_BD, query_ids = self.q_QD[queries], self.pool.queries.ids[queries]
        size = (len(query_ids), 0)
        docs_BK, scores_BK = np.zeros(size, np.int64), np.zeros(size, np.float32)
        bar = tqdm(
            total=len(self.pool.docs.texts), desc="search", unit="text", leave=False, delay=2
        )
        with bar:
            lows = range(0, bar.total, PART_TEXTS)
            for low, order_M, p_MD in zip(lows, orders, self.parts, strict=True):
                ids = self.pool.docs.ids[low : low + PART_TEXTS]
                hits = search(
                    q_BD, np.array(p_MD), ids, query_ids,
                    k=k, block=PART_TEXTS, device=self.device, order_N=order_M,
                )  # fmt: skip
                found_BK = np.where(hits.docs_QK < 0, -1, hits.docs_QK + low)
                docs_BK = np.concatenate([docs_BK, found_BK], axis=1)
                scores_BK = np.concatenate([scores_BK, hits.scores_QK], axis=1)
                at_BK = np.lexsort((place_N[docs_BK], -scores_BK), axis=1)[:, :k]
                docs_BK = np.take_along_axis(docs_BK, at_BK, axis=1)
                scores_BK = np.take_along_axis(scores_BK, at_BK, axis=1)
                bar.update(len(ids))
        return docs_BK, scores_BK

    def pair_scores(self, query_P: np.ndarray, doc_P: np.ndarray) -> np.ndarray:
        score_P = np.empty(len(doc_P), np.float32)
        part_P = doc_P // PART_TEXTS
        for part in np.unique(part_P).tolist():
            rows = np.flatnonzero(part_P == part)
            for some in np.split(rows, range(BLOCK_PAIRS, len(rows), BLOCK_PAIRS)):
                p_ND = self.parts[part][doc_P[some] - part * PART_TEXTS].astype(np.float32)
                # row by row, not as a matrix product: equal vectors have equal scores
                score_P[some] = (self.q_QD[query_P[some]] * p_ND).sum(axis=1)
        return score_P


def cached_embeddings(
    encoder: Encoder, texts: Sequence[str], side: str, cache_dir: Path
) -> list[np.ndarray]:
    """Memory-mapped embeddings of PART_TEXTS texts at a time; a part is encoded once ever."""
    parts = []
    for low in range(0, len(texts), PART_TEXTS):
        some = texts[low : low + PART_TEXTS]
        what = {"query": "queries", "passage": "passages"}[side]
        if len(texts) > PART_TEXTS:
            what += f" (from {low:,} of {len(texts):,})"
        all_n = np.arange(len(some))
        parts.append(encoder.embeddings(some, digest_of(some), all_n, side, cache_dir, what))
    return parts


class Bm25Source:
    def __init__(self, pool: Pool) -> None:
        self.pool, self.set = pool, pool.as_set()
        self.index = Bm25(self.set)

    def best(self, k: int, queries: slice = ALL) -> tuple[np.ndarray, np.ndarray]:
        ids, texts = self.set.query_ids[queries], self.set.query_texts[queries]
        hits = bm25_hits(replace(self.set, query_ids=ids, query_texts=texts), k, index=self.index)
        return hits.docs_QK, hits.scores_QK

    def pair_scores(self, query_P: np.ndarray, doc_P: np.ndarray) -> np.ndarray:
        score_P = np.empty(len(doc_P), np.float32)
        for some in np.split(np.arange(len(doc_P)), range(BLOCK_PAIRS, len(doc_P), BLOCK_PAIRS)):
            queries = [self.set.query_texts[q] for q in query_P[some].tolist()]
            score_P[some] = self.index.pair_scores(queries, doc_P[some])
        return score_P


class RunSource:
    """A TREC run file over the ids of the data."""

    def __init__(self, pool: Pool, path: Path) -> None:
        self.pool = pool
        queries, docs = pool.queries, pool.docs
        # under every id, those of equal texts included; of several the highest score counts
        every = RetrievalSet("", list(docs.number), [], list(queries.number), [], {})
        self.scores: list[dict[int, float]] = [{} for _ in queries.texts]
        for query_id, listed in read_run_scores(path, every).items():
            found = self.scores[queries.number[query_id]]
            for n, score in listed.items():
                doc = docs.number[every.doc_ids[n]]
                found[doc] = max(score, found.get(doc, score))

    @cached_property
    def _place_N(self) -> list[int]:
        return np.argsort(descending_ids(self.pool.docs.ids)).tolist()

    def best(self, k: int, queries: slice = ALL) -> tuple[np.ndarray, np.ndarray]:
        place_N, asked = self._place_N, self.scores[queries]
        docs_BK = np.full((len(asked), k), -1, np.int64)
        scores_BK = np.full(docs_BK.shape, -np.inf, np.float32)
        for row, found in enumerate(asked):
            first = sorted(found.items(), key=lambda hit: (-hit[1], place_N[hit[0]]))[:k]
            for n, (doc, score) in enumerate(first):
                docs_BK[row, n], scores_BK[row, n] = doc, score
        return docs_BK, scores_BK

    def pair_scores(self, query_P: np.ndarray, doc_P: np.ndarray) -> np.ndarray:
        """What the file lists. A pair that it does not list has at most the lowest score that the
        query has in it, which is taken for it: limits against such a positive leave nothing."""
        lowest = [min(found.values(), default=0.0) for found in self.scores]
        return np.array(
            [self.scores[q].get(d, lowest[q]) for q, d in zip(query_P, doc_P, strict=True)],
            np.float32,
        )
