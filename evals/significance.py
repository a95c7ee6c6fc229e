"""Is the difference between two systems on the same queries more than chance?

Shapes: n queries that both systems answered, M metrics, R resamples.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
_BLOCK_NUMBERS = 250_000  # random numbers drawn at once: 2 MB stay in the cache, 3 x faster


def paired(a, b, seed: int = 0, *, num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """Mean of b - a over queries, its 95% interval and a two-sided p-value: {"diff", "ci95", "p",
    "n"}.

    a, b           metric of each query for the two systems, same queries in the same order
    seed           of both resamplings
    num_resamples  bootstrap samples, and random sign patterns
    Raises ValueError when shapes disagree or a value is not finite.

    ci95: percentile bootstrap over queries (scipy.stats.bootstrap). p: randomisation test, in
    which the two systems swap names query by query at random (scipy.stats.monte_carlo_test with
    random signs); p >= 2 / (R + 1). Without queries or without any difference p is 1; a single
    query has no spread to resample, so its interval is the difference itself and says nothing.
    Source: Smucker, Allan and Carterette 2007 (randomisation, bootstrap in IR evaluation).
    """
    return paired_all({"": a}, {"": b}, seed, num_resamples=num_resamples)[""]


def paired_all(
    a: Mapping[str, Any], b: Mapping[str, Any], seed: int = 0, *, num_resamples: int = NUM_RESAMPLES
) -> dict[str, dict[str, Any]]:
    """paired() for every name of `b` at once. All names share their resamples, so many cost little
    more than one.
    """
    differences = {}
    for name in b:
        a_n, b_n = np.asarray(a[name], dtype=np.float64), np.asarray(b[name], dtype=np.float64)
        if a_n.ndim != 1 or a_n.shape != b_n.shape:
            raise ValueError(
                f"paired {name}: got shapes {a_n.shape} and {b_n.shape}; want one value a query,"
                " the same queries in both"
            )
        differences[name] = b_n - a_n
    intervals = bootstrap_ci95(differences, seed, num_resamples=num_resamples)
    p_values = _randomisation_p(differences, seed, num_resamples)
    return {
        name: {
            "diff": float(d_n.mean()) if len(d_n) else 0.0,
            "ci95": intervals[name],
            "p": p_values[name],
            "n": len(d_n),
        }
        for name, d_n in differences.items()
    }


def bootstrap_ci95(
    values: Mapping[str, Any], seed: int = 0, *, num_resamples: int = NUM_RESAMPLES
) -> dict[str, list[float]]:
    """name -> 95% percentile interval of its mean over resampled queries; [mean, mean] for fewer
    than two.

    All names hold one value a query, in the same order. Raises ValueError when a value is not
    finite.
    """
    from scipy import stats

    x_nM = _columns(values)
    n, num_names = x_nM.shape
    if n < 2 or num_names == 0:
        return {
            name: [float(x) for x in x_nM[:, m]] * 2 if n else [0.0, 0.0]
            for m, name in enumerate(values)
        }

    def means(query_Rn: np.ndarray, axis: int) -> np.ndarray:
        if query_Rn.ndim == 1:  # the sample itself
            return x_nM.mean(axis=0)
        # how often each query was drawn, then one matrix product for all metrics
        at_Rn = query_Rn + n * np.arange(len(query_Rn))[:, None]
        count_Rn = np.bincount(at_Rn.ravel(), minlength=at_Rn.size).reshape(at_Rn.shape)
        return (count_Rn @ x_nM / n).T

    found = stats.bootstrap(
        (np.arange(n),),
        means,
        vectorized=True,
        method="percentile",
        n_resamples=num_resamples,
        batch=max(1, _BLOCK_NUMBERS // n),
        rng=np.random.default_rng([seed, 0]),
    ).confidence_interval
    low_M, high_M = found.low, found.high
    return {name: [float(low_M[m]), float(high_M[m])] for m, name in enumerate(values)}


def _randomisation_p(
    differences: Mapping[str, np.ndarray], seed: int, num_resamples: int
) -> dict[str, float]:
    """name -> two-sided p-value of the mean of paired differences under random signs."""
    from scipy import stats

    d_nM = _columns(differences)
    n, num_names = d_nM.shape
    if n == 0 or num_names == 0:
        return dict.fromkeys(differences, 1.0)
    rng = np.random.default_rng([seed, 1])
    null_MR = np.empty((num_names, num_resamples))
    block = max(1, _BLOCK_NUMBERS // n)
    for low in range(0, num_resamples, block):
        size = min(block, num_resamples - low)
        sign_Rn = rng.integers(0, 2, (size, n), np.int8).astype(np.float64) * 2 - 1
        null_MR[:, low : low + size] = (sign_Rn @ d_nM / n).T
    p_values = {}
    for name, observed, null_R in zip(differences, d_nM.mean(axis=0), null_MR, strict=True):
        # one metric at a time: given several, scipy (1.17) compares each with the nulls of all
        p_values[name] = stats.monte_carlo_test(
            [observed],
            lambda size, null_R=null_R: null_R.reshape(size),
            np.mean,
            vectorized=True,
            n_resamples=num_resamples,
        ).pvalue.item()
    return p_values


def _columns(values: Mapping[str, Any]) -> np.ndarray:
    if not values:
        return np.zeros((0, 0))
    x_nM = np.stack([np.asarray(x, dtype=np.float64) for x in values.values()], axis=1)
    if not np.isfinite(x_nM).all():
        raise ValueError(
            "a metric value is NaN or infinite: differences and intervals have no meaning"
        )
    return x_nM
