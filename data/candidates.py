"""Where a query's hard negatives may come from: a model's nearest passages, BM25 or a run file.

A source gives the best passages of every query, best first in the one total order (score
descending, then id descending by bytes), and the score of any single pair.

Shapes: Q queries, N passages, D embedding, K candidates a query, P (query, passage) pairs.
"""

from collections.abc import Sequence
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


class CandidateSource(Protocol):
    def best(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(docs_QK int64, scores_QK float32), best first; -1 and -inf where there is none."""

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

    def best(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        place_N = np.argsort(descending_ids(self.pool.docs.ids))
        size = (len(self.pool.queries.texts), 0)
        docs_QK, scores_QK = np.zeros(size, np.int64), np.zeros(size, np.float32)
        bar = tqdm(
            total=len(self.pool.docs.texts), desc="search", unit="text", leave=False, delay=2
        )
        with bar:
            for low, p_MD in zip(range(0, bar.total, PART_TEXTS), self.parts, strict=True):
                ids = self.pool.docs.ids[low : low + PART_TEXTS]
                hits = search(
                    self.q_QD, np.array(p_MD), ids, self.pool.queries.ids,
                    k=k, block=PART_TEXTS, device=self.device,
                )  # fmt: skip
                found_QK = np.where(hits.docs_QK < 0, -1, hits.docs_QK + low)
                docs_QK = np.concatenate([docs_QK, found_QK], axis=1)
                scores_QK = np.concatenate([scores_QK, hits.scores_QK], axis=1)
                at_QK = np.lexsort((place_N[docs_QK], -scores_QK), axis=1)[:, :k]
                docs_QK = np.take_along_axis(docs_QK, at_QK, axis=1)
                scores_QK = np.take_along_axis(scores_QK, at_QK, axis=1)
                bar.update(len(ids))
        return docs_QK, scores_QK

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

    def best(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        hits = bm25_hits(self.set, k, index=self.index)
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

    def best(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        place_N = np.argsort(descending_ids(self.pool.docs.ids)).tolist()
        docs_QK = np.full((len(self.scores), k), -1, np.int64)
        scores_QK = np.full(docs_QK.shape, -np.inf, np.float32)
        for q, found in enumerate(self.scores):
            first = sorted(found.items(), key=lambda hit: (-hit[1], place_N[hit[0]]))[:k]
            for n, (doc, score) in enumerate(first):
                docs_QK[q, n], scores_QK[q, n] = doc, score
        return docs_QK, scores_QK

    def pair_scores(self, query_P: np.ndarray, doc_P: np.ndarray) -> np.ndarray:
        """What the file lists. A pair that it does not list has at most the lowest score that the
        query has in it, which is taken for it: limits against such a positive leave nothing."""
        lowest = [min(found.values(), default=0.0) for found in self.scores]
        return np.array(
            [self.scores[q].get(d, lowest[q]) for q, d in zip(query_P, doc_P, strict=True)],
            np.float32,
        )
