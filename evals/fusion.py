"""Two systems' scores of the same candidates as one: what neither alone gets right.

Each query's scores are standardised, so that logits, cosines and BM25 can be added, then averaged
with one weight for all queries. Source: Bruch et al. 2023 (An Analysis of Fusion Functions for
Hybrid Retrieval): a convex combination of normalised scores, whose one parameter a small sample of
queries is enough to fit.
"""

from collections.abc import Callable

import numpy as np

from evals.metrics import Metrics
from evals.rerank import Scores

WEIGHTS = tuple(round(0.05 * n, 2) for n in range(21))  # tried where none is given
METRIC = "ndcg@10"  # that decides between them


def fused(scores: Scores, others: Scores, weight: float) -> Scores:
    """weight * scores + (1 - weight) * others, both standardised by query.

    scores, others  query id -> float32 score of each of the same candidates in the same order
    weight          in [0, 1]: 1 is the order of `scores`, 0 that of `others`
    """
    assert scores.keys() == others.keys()
    return {
        query: (weight * standard(scores[query]) + (1 - weight) * standard(others[query])).astype(
            np.float32
        )
        for query in scores
    }


def standard(score_K: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1, float64; zeros where all scores are equal."""
    score_K = np.asarray(score_K, np.float64)
    if not len(score_K) or np.ptp(score_K) == 0:
        return np.zeros(len(score_K))
    return (score_K - score_K.mean()) / score_K.std()


def best_weight(
    scores: Scores, others: Scores, judge: Callable[[Scores], Metrics]
) -> tuple[float, dict[str, float]]:
    """(the weight of the best mean nDCG@10, the mean at each of WEIGHTS); of equal ones that
    nearest to one half.

    judge  scores -> metrics of the order that they give
    """
    means = {w: judge(fused(scores, others, w)).means[METRIC] for w in WEIGHTS}
    best = max(WEIGHTS, key=lambda w: (means[w], -abs(w - 0.5)))
    return best, {f"{w:g}": mean for w, mean in means.items()}
