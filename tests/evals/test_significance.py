"""Intervals and p-values against scipy on its own, closed forms and full enumeration."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from evals.significance import bootstrap_ci95, paired, paired_all


def two_systems(n: int, gain: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.random(n)
    return a, a + gain + rng.normal(0, 0.3, n)


def test_interval_equals_scipy_bootstrap_of_the_mean():
    """Ours counts draws and multiplies matrices; scipy gathers and averages the same draws."""
    a, b = two_systems(137, 0.05)
    theirs = stats.bootstrap(
        (b - a,), np.mean, method="percentile", n_resamples=10_000,
        rng=np.random.default_rng([0, 0]),
    ).confidence_interval  # fmt: skip
    assert paired(a, b)["ci95"] == pytest.approx([theirs.low, theirs.high], abs=1e-12)


def test_interval_is_the_normal_one_for_many_queries():
    """Central limit: mean +- 1.96 s / sqrt(n); the ends scatter by about 2% of s / sqrt(n)."""
    a, b = two_systems(2000, 0.02)
    d = b - a
    found = paired(a, b)
    half = 1.96 * d.std() / math.sqrt(2000)
    assert found["diff"] == pytest.approx(d.mean(), abs=1e-12) and found["n"] == 2000
    assert found["ci95"] == pytest.approx([d.mean() - half, d.mean() + half], abs=0.1 * half)


@pytest.mark.parametrize("seed", range(4))
def test_p_equals_the_share_of_all_sign_patterns(seed):
    """2^11 patterns enumerated; sampling 10,000 of them errs by at most 4 standard errors."""
    a, b = two_systems(11, 0.1, seed)
    d = b - a
    means = np.array([np.mean(d * signs) for signs in itertools.product((-1, 1), repeat=11)])
    exact = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
    assert (
        abs(paired(a, b)["p"] - exact) < 8 * math.sqrt(exact / 2 * (1 - exact / 2) / 10_000) + 2e-4
    )


@pytest.mark.parametrize("num_changed", [1, 3, 5])
def test_few_changed_queries_give_the_p_of_those_alone(num_changed):
    """Where k of 400 queries changed, all for the better, p is 2 / 2^k.

    The observed mean ties with every pattern that keeps those k signs; rounding must not break it.
    """
    a = np.random.default_rng(1).random(400)
    b = a.copy()
    b[7 : 7 + 50 * num_changed : 50] += [0.13, 0.07, 0.21, 0.4, 0.3310][:num_changed]
    exact = 2 / 2**num_changed
    assert paired(a, b)["p"] == pytest.approx(exact, abs=8 * math.sqrt(exact / 2 / 10_000))


def test_p_agrees_with_the_t_test_for_many_queries():
    a, b = two_systems(1000, 0.02, seed=8)
    exact = stats.ttest_rel(a, b).pvalue
    assert 0.001 < exact < 0.5
    assert paired(a, b)["p"] == pytest.approx(exact, abs=4 * 2 * math.sqrt(exact / 2 / 10_000))


def test_a_certain_difference_has_the_smallest_p():
    a, b = two_systems(500, 0.5)
    assert paired(a, b)["p"] == pytest.approx(2 / 10_001)


def test_many_metrics_at_once_equal_one_at_a_time():
    """scipy's test, given several statistics, compares each with the null values of all (1.17)."""
    a, b = two_systems(300, 0.02)
    others = {"small": (a, b), "large": (a, b + 5), "none": (a, a), "worse": (b, a)}
    together = paired_all(
        {n: x for n, (x, _) in others.items()}, {n: y for n, (_, y) in others.items()}
    )
    for name, (x, y) in others.items():
        alone = paired(x, y)
        assert together[name]["p"] == alone["p"], name
        assert together[name]["ci95"] == pytest.approx(alone["ci95"], abs=1e-12), name
    assert together["none"]["p"] == 1.0 and together["large"]["p"] < 0.001


def test_swapping_the_systems_turns_the_sign():
    a, b = two_systems(200, 0.03)
    one, other = paired(a, b), paired(b, a)
    assert other["diff"] == -one["diff"]
    assert other["ci95"] == pytest.approx([-one["ci95"][1], -one["ci95"][0]], abs=1e-12)
    assert other["p"] == pytest.approx(one["p"], abs=0.02)


def test_p_is_uniform_when_there_is_no_difference():
    """Too sure a test would reject more than its level: 200 draws, 5% +- 4 s.e."""
    rng = np.random.default_rng(7)
    a = rng.random((60, 200))
    b = rng.random((60, 200))
    found = paired_all(
        {str(i): a[:, i] for i in range(200)},
        {str(i): b[:, i] for i in range(200)},
        num_resamples=2000,
    )
    share = np.mean([one["p"] <= 0.05 for one in found.values()])
    covered = np.mean([one["ci95"][0] <= 0 <= one["ci95"][1] for one in found.values()])
    assert share < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)
    assert (
        covered > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 200) - 0.02
    )  # percentile intervals run short


def test_degenerate_cases():
    assert paired([], []) == {"diff": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "n": 0}
    assert paired([0.25], [0.75]) == {"diff": 0.5, "ci95": [0.5, 0.5], "p": 1.0, "n": 1}
    assert paired([1, 0, 1], [1, 0, 1]) == {"diff": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "n": 3}
    constant = paired([0] * 20, [1] * 20)
    assert constant["ci95"] == [1.0, 1.0] and constant["p"] < 0.001
    assert paired_all({}, {}) == {}
    assert bootstrap_ci95({"a": [], "b": []}) == {"a": [0.0, 0.0], "b": [0.0, 0.0]}


def test_seeded():
    a, b = two_systems(50, 0.05)
    assert paired(a, b, 3) == paired(a, b, 3)
    assert paired(a, b, 3)["ci95"] != paired(a, b, 4)["ci95"]


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="same queries in both"):
        paired([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="NaN or infinite"):
        paired([1, 2], [1, float("nan")])


def test_a_thousand_queries_take_under_half_a_second():
    """Processor time; a report makes dozens of these."""
    a, b = two_systems(1000, 0.05)
    paired(a[:10], b[:10])  # the library's import
    start = time.process_time()
    paired_all({str(i): a for i in range(20)}, {str(i): b for i in range(20)})
    assert time.process_time() - start < 1.0
    start = time.process_time()
    paired(a, b)
    assert time.process_time() - start < 0.5
