"""The temperature of a reranker's logits and the calibration error, against other computations."""

import numpy as np
import pytest
import torch

from evals.calibration import calibration_error, fit_temperature


def drawn(temperature: float, n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose sigmoid is right once divided by `temperature`, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    right = rng.normal(-1, 2, n)
    return right * temperature, rng.random(n) < 1 / (1 + np.exp(-right))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 12.0])
def test_the_temperature_that_made_the_data_is_found(temperature):
    logit, label = drawn(temperature)
    # about 20,000 labels: the estimate's standard error is 1.5%
    assert fit_temperature(logit, label) == pytest.approx(temperature, rel=0.06)


def test_the_minimum_is_that_of_a_gradient_method():
    """LBFGS on torch's own loss, another parametrisation and precision."""
    logit, label = drawn(2.5, n=500, seed=1)
    x, y = torch.tensor(logit), torch.tensor(label, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x * scale, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(logit, label) == pytest.approx(1 / scale.item(), rel=1e-4)


def test_separable_logits_stop_at_the_lower_bound_and_inverted_ones_at_the_upper():
    """There the best temperature is 0 or infinite: a fit that follows it exports NaN or zeros."""
    logit, label = np.array([-1.0, -2.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
    assert fit_temperature(logit, label) == pytest.approx(0.05)
    assert fit_temperature(-logit, label) == pytest.approx(20)
    assert fit_temperature(logit * 1e4, label) <= 20


def test_nothing_to_fit_leaves_the_logits_as_they_are():
    for label in ([], [1, 1], [0, 0]):
        assert fit_temperature(np.ones(len(label)), np.array(label)) == 1.0
    with pytest.raises(ValueError, match=r"want one of each a pair"):
        fit_temperature(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"NaN"):
        fit_temperature(np.array([np.nan, 1]), np.array([1, 0]))


def test_grades_above_zero_are_relevant():
    logit, label = drawn(1.5, n=300)
    assert fit_temperature(logit, label * 3.0) == fit_temperature(logit, label)


def test_calibration_error_equals_a_loop_over_bins():
    logit, label = drawn(0.4, n=700, seed=2)
    prob = 1 / (1 + np.exp(-logit / 2))
    want = 0.0
    for low in range(15):
        inside = (prob >= low / 15) & ((prob < (low + 1) / 15) | (low == 14))
        if inside.any():
            want += inside.mean() * abs(label[inside].mean() - prob[inside].mean())
    assert calibration_error(logit, label, 2.0) == pytest.approx(want, abs=1e-12)
    assert calibration_error(np.zeros(0), np.zeros(0)) == 0.0
    assert calibration_error(np.array([800.0, -800.0]), np.array([1, 0])) == 0.0  # no overflow


def test_the_fit_lowers_the_error_of_overconfident_logits():
    """On other data than it was fitted on."""
    fitted = fit_temperature(*drawn(8.0, seed=3))
    logit, label = drawn(8.0, seed=4)
    assert calibration_error(logit, label) > 0.1
    assert calibration_error(logit, label, fitted) < 0.02
