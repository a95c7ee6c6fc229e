"""Scores as probabilities: temperature and shift of a reranker's logits, and how far off they are.

Shapes: P pairs, L labels.
"""

import numpy as np

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
NUM_BINS = 15


def fit_calibration(logit_P: np.ndarray, label_P: np.ndarray) -> tuple[float, float]:
    """(T, b) for which sigmoid(logit / T + b) has the least binary cross-entropy, T in [0.05, 20].

    label_P  above 0: relevant
    (1, 0) where nothing can be fitted: no pair, or labels all alike. A T at a bound says that the
    sigmoid of these logits is no probability. The shift is what logits of listwise losses need:
    those fix differences within a query alone.
    Source: Platt 1999, "Probabilistic Outputs for Support Vector Machines", sec. 2.1.
    """
    from scipy.optimize import minimize

    logit_P = np.asarray(logit_P, np.float64)
    is_relevant_P = np.asarray(label_P) > 0
    _check(logit_P, is_relevant_P)
    if is_relevant_P.all() or not is_relevant_P.any():
        return 1.0, 0.0
    mean, width = logit_P.mean(), max(float(logit_P.std()), 1e-12)
    x_P = (logit_P - mean) / width  # the same steps serve logits of any size
    sign_P = np.where(is_relevant_P, -1.0, 1.0)

    def loss(slope_and_shift: np.ndarray) -> tuple[float, np.ndarray]:
        wrong_P = sign_P * (slope_and_shift[0] * x_P + slope_and_shift[1])
        share_P = sign_P * np.exp(-np.logaddexp(0, -wrong_P))
        value = float(np.logaddexp(0, wrong_P).mean())
        return value, np.array([(share_P * x_P).mean(), share_P.mean()])

    low, high = width / MAX_TEMPERATURE, width / MIN_TEMPERATURE
    found = minimize(
        loss, [np.clip(1.0, low, high), 0.0], jac=True, method="L-BFGS-B",
        bounds=[(low, high), (None, None)], options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    )  # fmt: skip
    slope, shift = found.x
    return float(width / slope), float(shift - slope * mean / width)


def calibration_error(
    logit_P: np.ndarray, label_P: np.ndarray, temperature: float = 1.0, bias: float = 0.0
) -> float:
    """Expected calibration error of sigmoid(logit / T + b): |share relevant - mean probability|, a
    mean over pairs in 15 bins of equal width; 0 without pairs.

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    logit_P = np.asarray(logit_P, np.float64)
    is_relevant_P = np.asarray(label_P) > 0
    _check(logit_P, is_relevant_P)
    if not len(logit_P):
        return 0.0
    prob_P = np.exp(-np.logaddexp(0, -(logit_P / temperature + bias)))
    return _error_in_bins(is_relevant_P, prob_P)


def fit_temperature(logit_PL: np.ndarray, label_P: np.ndarray) -> float:
    """T in [0.05, 20] for which softmax(logits / T) has the least cross-entropy; 1 without pairs.

    label_P  whole numbers in [0, L)
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", sec. 4.2.
    """
    from scipy.optimize import minimize_scalar

    logit_PL, right_P = _checked(logit_PL, label_P)
    if not len(right_P):
        return 1.0

    def loss(slope: float) -> float:  # convex in it
        z_PL = slope * logit_PL
        return float((np.logaddexp.reduce(z_PL, 1) - z_PL[np.arange(len(z_PL)), right_P]).mean())

    bounds = (1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE)
    return float(1 / minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-8}).x)


def label_calibration_error(
    logit_PL: np.ndarray, label_P: np.ndarray, temperature: float = 1.0
) -> float:
    """As calibration_error, of softmax(logits / T): how often the likeliest label is right, against
    its probability. Source: Guo et al. 2017, eq. 3."""
    logit_PL, right_P = _checked(logit_PL, label_P)
    if not len(right_P):
        return 0.0
    z_PL = logit_PL / temperature
    best_P = z_PL.argmax(1)
    prob_P = np.exp(z_PL.max(1) - np.logaddexp.reduce(z_PL, 1))
    return _error_in_bins(best_P == right_P, prob_P)


def _error_in_bins(is_right_P: np.ndarray, prob_P: np.ndarray) -> float:
    bin_P = np.minimum((prob_P * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bin_P, weights=is_right_P - prob_P, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(prob_P))


def _checked(logit_PL: np.ndarray, label_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logit_PL, label_P = np.asarray(logit_PL, np.float64), np.asarray(label_P)
    _check(logit_PL.sum(1), label_P)  # not finite where one of them is not
    return logit_PL, label_P.astype(np.int64)


def _check(logit_P: np.ndarray, label_P: np.ndarray) -> None:
    if logit_P.ndim != 1 or logit_P.shape != label_P.shape:
        raise ValueError(
            f"calibration: got logits {logit_P.shape} and labels {label_P.shape}; want one of"
            " each a pair"
        )
    if not np.isfinite(logit_P).all():
        raise ValueError(
            "calibration: a logit is NaN or infinite; the reranker's weights are broken"
        )
