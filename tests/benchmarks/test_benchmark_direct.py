"""The cached step against the direct one: a ratio means something only if both do the same work."""

import sys

import pytest

from benchmarks.step import arguments, work_together

TINY = ["--peer", "direct", "--precision", "fp32", "--length", "32", "--chunk-tokens", "64"]
TINY += ["--batch", "8", "--pairs", "24", "--rounds", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "replayed_share"), [("inf", 0.0), ("0", 1.0)])
def test_cached_and_direct_step_find_the_same_loss(budget, replayed_share, tiny_base, monkeypatch):
    """With dropout: another seed, another order of chunks or a weight that moved between the two
    would show; and so would a row that names another budget than it ran with."""
    options = [*TINY, "--base", str(tiny_base), "--device", "cpu", "--budget-mib", budget]
    monkeypatch.setattr(sys, "argv", ["step", *options])
    found = work_together(arguments())
    # float32, one network: only the order of sums may differ
    assert found["loss_difference"] < 1e-5
    assert (found["budget_mib"], found["replayed_share"]) == (budget, replayed_share)
    assert [len(s) for s in found["seconds"].values()] == [2, 2]  # the first step is not counted


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_budget(tiny_base, run_benchmark):
    """End to end: paired times from one process, peaks from one process a side."""
    (found,) = run_benchmark("step", *TINY, "--base", str(tiny_base), "--budget-mib", "0")
    assert found["name"] == "step b8 l32 attention dropout 0.1 budget 0"
    assert found["rounds"] == 2
    assert found["peak_mib"] > 50 and found["peer_peak_mib"] > 50
    assert found["time_ratio"] == pytest.approx(1 / found["ratio"], rel=0.01)
