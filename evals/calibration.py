"""Scores as probabilities: a temperature for a reranker's logits, and how far off they are.

Shapes: P pairs.
"""

import numpy as np

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
NUM_BINS = 15


def fit_temperature(logit_P: np.ndarray, label_P: np.ndarray) -> float:
    """The T in [0.05, 20] for which sigmoid(logit / T) has the least binary cross-entropy.

    label_P  above 0: relevant
    1 where nothing can be fitted: no pair, or labels all alike. A T at a bound says that the
    sigmoid of these logits is no probability: listwise losses fix differences within a query
    alone.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", sec. 4.2.
    """
    from scipy.optimize import minimize_scalar

    logit_P = np.asarray(logit_P, np.float64)
    is_relevant_P = np.asarray(label_P) > 0
    _check(logit_P, is_relevant_P)
    if is_relevant_P.all() or not is_relevant_P.any():
        return 1.0
    signed_P = np.where(is_relevant_P, -logit_P, logit_P)

    def loss(log_scale: float) -> float:  # convex in 1 / T, so it has one minimum in log T too
        return float(np.logaddexp(0, signed_P * np.exp(log_scale)).mean())

    bounds = (-np.log(MAX_TEMPERATURE), -np.log(MIN_TEMPERATURE))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(-found.x))


def calibration_error(logit_P: np.ndarray, label_P: np.ndarray, temperature: float = 1.0) -> float:
    """Expected calibration error of sigmoid(logit / T): |share relevant - mean probability|, a mean
    over pairs in 15 bins of equal width; 0 without pairs.

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    logit_P = np.asarray(logit_P, np.float64)
    is_relevant_P = np.asarray(label_P) > 0
    _check(logit_P, is_relevant_P)
    if not len(logit_P):
        return 0.0
    prob_P = np.exp(-np.logaddexp(0, -logit_P / temperature))
    bin_P = np.minimum((prob_P * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bin_P, weights=is_relevant_P - prob_P, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(prob_P))


def _check(logit_P: np.ndarray, is_relevant_P: np.ndarray) -> None:
    if logit_P.ndim != 1 or logit_P.shape != is_relevant_P.shape:
        raise ValueError(
            f"calibration: got logits {logit_P.shape} and labels {is_relevant_P.shape}; want one of"
            " each a pair"
        )
    if not np.isfinite(logit_P).all():
        raise ValueError(
            "calibration: a logit is NaN or infinite; the reranker's weights are broken"
        )
