"""Temperature and shift of a reranker's logits and the calibration error, against other
computations.
"""

import numpy as np
import pytest
import torch

from evals.calibration import (
    calibration_error,
    fit_calibration,
    fit_temperature,
    label_calibration_error,
)


def drawn(
    temperature: float, bias: float = 0.0, n: int = 20_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits for which sigmoid(logit / temperature + bias) is right, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    right = rng.normal(-1, 2, n)
    return (right - bias) * temperature, rng.random(n) < 1 / (1 + np.exp(-right))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_the_calibration_that_made_the_data_is_found(temperature, bias):
    """Logits of listwise losses are off by any shift: a temperature alone cannot mend them."""
    found = fit_calibration(*drawn(temperature, bias))
    # about 20,000 labels: the estimates' standard errors are 1.5% and .03
    assert found == pytest.approx((temperature, bias), rel=0.06, abs=0.1)


def test_the_minimum_is_that_of_another_method():
    """LBFGS on torch's own loss, and scikit-learn's logistic regression."""
    logit, label = drawn(2.5, 1.5, n=500, seed=1)
    x, y = torch.tensor(logit), torch.tensor(label, dtype=torch.float64)
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [line], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x * line[0] + line[1], y)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = fit_calibration(logit, label)
    assert found == pytest.approx((1 / line[0].item(), line[1].item()), rel=1e-4)
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is missing")
    other = linear.LogisticRegression(C=np.inf, tol=1e-10).fit(logit[:, None], label)
    assert found == pytest.approx((1 / other.coef_.item(), other.intercept_.item()), rel=1e-4)


def test_separable_logits_stop_at_the_lower_bound_and_inverted_ones_at_the_upper():
    """There the best temperature is 0 or infinite: a fit that follows it exports NaN or zeros."""
    logit, label = np.array([-1.0, -2.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
    assert fit_calibration(logit, label)[0] == pytest.approx(0.05)
    assert fit_calibration(-logit, label)[0] == pytest.approx(20)
    for scale in (1e4, 1e-6):
        temperature, bias = fit_calibration(logit * scale, label)
        assert 0.05 <= temperature <= 20 and np.isfinite(bias)


def test_nothing_to_fit_leaves_the_logits_as_they_are():
    for label in ([], [1, 1], [0, 0]):
        assert fit_calibration(np.ones(len(label)), np.array(label)) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"want one of each a pair"):
        fit_calibration(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"NaN"):
        fit_calibration(np.array([np.nan, 1]), np.array([1, 0]))


def test_logits_all_alike_become_the_share_that_is_relevant():
    temperature, bias = fit_calibration(np.full(8, 3.0), np.array([1, 0, 0, 0, 0, 0, 0, 1]))
    assert 1 / (1 + np.exp(-(3 / temperature + bias))) == pytest.approx(0.25, abs=1e-6)


def test_grades_above_zero_are_relevant():
    logit, label = drawn(1.5, n=300)
    assert fit_calibration(logit, label * 3.0) == fit_calibration(logit, label)


def test_calibration_error_equals_a_loop_over_bins():
    logit, label = drawn(0.4, n=700, seed=2)
    prob = 1 / (1 + np.exp(-logit / 2 - 0.3))
    want = 0.0
    for low in range(15):
        inside = (prob >= low / 15) & ((prob < (low + 1) / 15) | (low == 14))
        if inside.any():
            want += inside.mean() * abs(label[inside].mean() - prob[inside].mean())
    assert calibration_error(logit, label, 2.0, 0.3) == pytest.approx(want, abs=1e-12)
    assert calibration_error(np.zeros(0), np.zeros(0)) == 0.0
    assert calibration_error(np.array([800.0, -800.0]), np.array([1, 0])) == 0.0  # no overflow


def test_the_fit_lowers_the_error_of_overconfident_logits():
    """On other data than it was fitted on."""
    fitted = fit_calibration(*drawn(8.0, -1.0, seed=3))
    logit, label = drawn(8.0, -1.0, seed=4)
    assert calibration_error(logit, label) > 0.1
    assert calibration_error(logit, label, *fitted) < 0.02


def drawn_labels(temperature: float, n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of three labels for which softmax(logits / temperature) is right."""
    rng = np.random.default_rng(0)
    right_PL = rng.normal(0, 2, (n, 3))
    label_P = (right_PL + rng.gumbel(size=(n, 3))).argmax(1)  # Gumbel-max: a draw by softmax
    return right_PL * temperature, label_P


@pytest.mark.parametrize("temperature", [0.1, 1.0, 12.0])
def test_the_temperature_of_several_labels_is_that_which_made_the_data(temperature):
    logit_PL, label_P = drawn_labels(temperature)
    found = fit_temperature(logit_PL, label_P)
    assert found == pytest.approx(temperature, rel=0.05)
    slope = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope], max_iter=200, line_search_fn="strong_wolfe")
    x, y = torch.tensor(logit_PL) / temperature, torch.tensor(label_P)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x * slope, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found == pytest.approx(temperature / slope.item(), rel=1e-4)
    assert label_calibration_error(logit_PL, label_P, found) < 0.015


def test_the_error_of_several_labels_by_hand():
    """Both pairs say .7311 for label 1 and one is right; T=1e9 says a half for either."""
    logit_PL, label_P = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([1, 0])
    assert label_calibration_error(logit_PL, label_P) == pytest.approx(0.7310586 - 0.5)
    assert label_calibration_error(logit_PL, label_P, 1e9) == pytest.approx(0, abs=1e-8)
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0)) == 1.0
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_temperature(np.array([[0.0, -np.inf]]), np.array([0]))
    with pytest.raises(ValueError, match="want one of each a pair"):
        fit_temperature(logit_PL, np.array([1]))
