"""Figures show the numbers they were given."""

import numpy as np
import pytest

from data.records import RetrievalSet
from evals import figures

DATA = RetrievalSet(
    "s", ["d1", "d2", "d3"], ["first  text\nhere", "second " * 40, "third"],
    ["q1", "q2", "q3"], ["one?", "two?", "three?"],
    {"q1": {"d1": 1}, "q2": {"d2": 1, "d3": 0}, "q3": {"d3": 2}},
)  # fmt: skip


def test_sampled_scores_are_of_relevant_and_of_other_documents():
    rng = np.random.default_rng(0)
    q, p = rng.standard_normal((3, 8)), rng.standard_normal((3, 8))
    scores = figures.sample_scores(q, p, DATA, num_negatives=50)
    assert scores["positive"].tolist() == pytest.approx([p[i] @ q[i] for i in range(3)])
    others = {round(float(p[j] @ q[i]), 9) for i in range(3) for j in range(3) if i != j}
    assert set(scores["negative"].round(9).tolist()) == others


def rows_of_a_run() -> list[dict]:
    rows = [{"step": s, "loss": 3 / s, "dev/mrr@10": 0.1} for s in range(1, 80)]
    rows += [{"step": s, "dev/ndcg@10": 0.5, "dev/ndcg@10/64": 0.4} for s in (20, 40)]
    return rows


def made(folder) -> list:
    values = {
        "bm25": {"": [0.5] * 9},
        "base": {"384": [0.1, 0.4], "64": [0.2, 0.1]},
        "tuned": {"64": [1]},
    }
    samples = {"base": {"positive": np.array([0.5, 0.7]), "negative": np.array([0.1])}}
    return [
        figures.plot_training(rows_of_a_run(), folder / "a" / "training.png"),
        figures.plot_training([{"step": 1, "loss": None}], folder / "nothing.png"),
        figures.plot_dims(values, folder / "dims.png"),
        figures.plot_scores(samples, folder / "scores.png"),
        figures.plot_scores(
            {"tuned": {"positive": np.zeros(0), "negative": np.zeros(0)}}, folder / "no.png"
        ),
    ]


def test_equal_values_have_no_interval_below_nothing(tmp_path):
    """Eleven queries whose answer is at rank 10: a resample's mean is above theirs by a bit."""
    values = {"base": {"8": [1 / np.log2(11)] * 11}, "tuned": {"8": [1 / np.log2(11)] * 12}}
    assert figures.plot_dims(values, tmp_path / "dims.png").is_file()


@pytest.mark.slow
def test_figures_are_png_and_the_same_numbers_give_the_same_bytes(tmp_path):
    """A report that is made again must not look changed to git; pyplot's state must not leak in."""
    one, other = made(tmp_path / "1"), made(tmp_path / "2")
    for a, b in zip(one, other, strict=True):
        assert a.read_bytes().startswith(b"\x89PNG") and a.read_bytes() == b.read_bytes()
    left = {p.name for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert left == {"training.png", "nothing.png", "dims.png", "scores.png", "no.png"}


def test_training_figure_draws_the_logged_points():
    """Rows without a loss or a dev value must not shift the points of the others."""
    figure = figures.training_figure(rows_of_a_run(), metric="ndcg@10")
    loss, dev = figure.axes
    step, value = loss.lines[0].get_data()
    assert list(step) == list(range(1, 80)) and value[4] == pytest.approx(0.6)
    assert [line.get_label() for line in dev.lines] == ["full", "64"]
    assert [list(line.get_ydata()) for line in dev.lines] == [[0.5, 0.5], [0.4, 0.4]]
