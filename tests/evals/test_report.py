"""Tables and examples say what the numbers say."""

import numpy as np
import pytest

from data.records import RetrievalSet
from evals import report
from evals.metrics import Metrics

DELTA = {"diff": 0.0523, "ci95": [-0.0004, 0.1049], "p": 0.0321, "n": 40}
METRICS = {
    "bm25": {"ndcg@10": 0.598, "accuracy@1": 0.41},
    "base": {"64": {"ndcg@10": 0.53}, "384": {"ndcg@10": 0.676, "accuracy@1": 0.5}},
    "tuned": {"64": {"ndcg@10": 0.7}, "384": {"ndcg@10": 0.7283, "accuracy@1": 1.0}},
}


def test_result_table_has_a_row_a_dimension_widest_first():
    table = report.result_table(METRICS, {"384": {"ndcg@10": DELTA}}).splitlines()
    assert table[0].split() == "dim BM25 base tuned gain [95% interval] p".split()
    assert table[2].split() == "384 .598 .676 .728 +.052 [+.000, +.105] .032".split()
    assert table[3].split() == "64 .598 .530 .700 - -".split()
    assert len({len(line) for line in table}) == 1  # aligned
    without = report.result_table({k: v for k, v in METRICS.items() if k != "bm25"}, {})
    assert "BM25" not in without


def test_markdown_tables_are_well_formed():
    table = report.result_table(METRICS, {}, markdown=True).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert set(table[1]) <= set("|:-")


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "1.000"), (0.05, ".050"), (0.001, ".001"), (0.00099, "<.001")]
)
def test_p_values_are_never_written_as_zero(p, text):
    assert report.p_text(p) == text


def test_gains_show_sign_and_interval():
    gain = {"diff": -1.0, "ci95": [-1.25, 0.5]}
    assert report.gain_text(gain) == "-1.000 [-1.250, +.500]"


def test_metrics_table_leaves_out_metrics_that_nobody_has():
    table = report.metrics_table(
        {"bm25": METRICS["bm25"]}, intervals={"bm25": {"ndcg@10": [0.5, 0.7]}}
    ).splitlines()
    assert table[0].split() == "Accuracy@1 nDCG@10 [95% interval]".split()
    assert table[2].split() == "BM25 .410 .598 [.500, .700]".split()


def test_comparisons_pair_queries_by_id():
    """Two files may list the same queries in another order; pairing by place would be noise."""
    a = Metrics(["q1", "q2", "q3"], {"ndcg@10": np.array([0.1, 0.5, 0.9])}, 0)
    b = Metrics(["q3", "q1", "q2"], {"ndcg@10": np.array([0.9, 0.1, 0.5])}, 0)
    assert report.compare(a, b)["ndcg@10"] == {"diff": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "n": 3}
    with pytest.raises(ValueError, match=r"same queries on both sides.*\['q3'\]"):
        report.compare(a, Metrics(["q1", "q2"], {"ndcg@10": np.array([0.1, 0.5])}, 0))


DATA = RetrievalSet(
    "s", ["d1", "d2", "d3"], ["first  text\nhere", "second " * 40, "third"],
    ["q1", "q2", "q3"], ["one?", "two?", "three?"],
    {"q1": {"d1": 1}, "q2": {"d2": 1, "d3": 0}, "q3": {"d3": 2}},
)  # fmt: skip


def test_examples_show_queries_whose_first_hit_changed():
    before = {"q1": ["d1", "d2"], "q2": ["d3", "d2"], "q3": ["d1"]}
    after = {"q1": ["d1", "d3"], "q2": ["d2", "d3"], "q3": ["d2", "d1"]}
    text = report.examples_text(before, after, DATA, count=2, width=60)
    assert "Q: two?" in text and "Q: three?" in text and "Q: one?" not in text
    assert "before: answer at rank 2" in text and "after: answer at rank 1" in text
    assert "before: no answer among the first 1" in text
    assert "   *2. second" in text and "    1. third" in text
    assert max(map(len, text.splitlines())) <= 60
    assert "   *1. first text here" in report.examples_text(before, after, DATA, count=3)
    assert report.examples_text(before, after, DATA) == report.examples_text(before, after, DATA)
    assert report.examples_text({}, {}, DATA) == ""


def test_intervals_of_several_metrics_stand_beside_them():
    """A reranker's table has three; a system without one keeps its column."""
    systems = {"a": {"mrr": 0.5, "ndcg@10": 0.25}, "b": {"mrr": 1.0, "ndcg@10": 1.0}}
    table = report.metrics_table(
        systems, ("mrr", "map", "ndcg@10"), interval_of=("mrr", "ndcg@10"),
        intervals={"a": {"mrr": [0.4, 0.6], "ndcg@10": [0.2, 0.3]}, "b": {"mrr": [0.9, 1.0]}},
    ).splitlines()  # fmt: skip
    assert table[0].split() == "MRR [95% interval] nDCG@10 [95% interval]".split()
    assert table[2].split() == "a .500 [.400, .600] .250 [.200, .300]".split()
    assert table[3].split() == "b 1.000 [.900, 1.000] 1.000".split()


def test_report_holds_tables_examples_and_figures():
    tables = report.retrieval_tables({"metrics": METRICS, "delta": {"384": {"ndcg@10": DELTA}}})
    text = report.report_markdown(
        "run", tables | {"Other set": "| x |"}, facts={"seed": 0}, examples="Q: one?",
        figures={"curve": "figures/curve.png"},
    )  # fmt: skip
    for part in ("# run", "+.052 [+.000, +.105]", "## Other set", "Q: one?", "- seed: 0"):
        assert part in text
    assert "![curve](figures/curve.png)" in text and "## All metrics at 384 dimensions" in text
    nothing = report.retrieval_tables({"metrics": {}, "delta": {}})
    assert report.report_markdown("n", nothing).startswith("# n")
