"""The memory benchmark measures one step a process and draws what it measured."""

import pytest

from benchmarks.memory import made_up_pairs, one_line, plot

PNG = b"\x89PNG"


@pytest.mark.slow
def test_the_command_measures_both_steps_and_draws(tiny_base, run_benchmark, tmp_path):
    """End to end on a tiny model; the direct step only as far as it was asked for."""
    options = ["--base", str(tiny_base), "--batch", "8", "32", "--direct-up-to", "8"]
    options += ["--length", "16", "--budget-mib", "0", "--chunk-tokens", "64"]
    rows = run_benchmark("memory", *options, "--figure", str(tmp_path / "memory.png"))
    assert [r["batch"] for r in rows] == [8, 32]
    assert [r["peer"] for r in rows] == ["direct", ""]
    assert rows[0]["peer_peak_mib"] > 50 and rows[1]["peer_peak_mib"] == ""
    for found in rows:
        assert found["peak_mib"] >= found["before_mib"] > 50
        assert found["in_use_mib"] >= found["before_mib"]
        assert found["replayed_share"] == 1
        # two sides of at most `batch` texts, 16 floats each, and gradients
        assert found["embeddings_mib"] == round(2 * 2 * found["batch"] * 16 * 4 / 2**20, 2)
        assert 2 * found["batch"] * 8 <= found["tokens"] <= 2 * found["batch"] * 16
    assert (tmp_path / "memory.png").read_bytes().startswith(PNG)


def test_made_up_texts_are_distinct_and_of_the_lengths_that_were_asked_for():
    """Equal texts are encoded once: the batch would be smaller than its name."""
    words = ["alpha", "beta", "gamma", "##ing", "[CLS]", "1984"]
    pairs = list(made_up_pairs(words, 50, 32))
    texts = [text for pair in pairs for text in pair]
    assert len(set(texts)) == 100
    assert {word for text in texts for word in text.split()} == {"alpha", "beta", "gamma"}
    lengths = {len(text.split()) + 2 for text in texts}
    assert min(lengths) >= 16 and max(lengths) <= 32 and len(lengths) > 10
    assert pairs == list(made_up_pairs(words, 50, 32))


def test_a_figure_shows_the_newest_row_of_each_size_with_equal_settings(tmp_path):
    """The file of rows grows for years: lines must not mix lengths or budgets."""
    settings = {"base": "a/b", "precision": "fp32", "device": "cpu", "budget_mib": 512.0}
    settings |= {"chunk_tokens": 4096, "peer_peak_mib": "", "embeddings_mib": 1}
    settings |= {"peer_in_use_mib": "", "in_use_mib": 10}
    rows = [
        settings | {"length": 32, "batch": 128, "peak_mib": 11},
        settings | {"length": 99, "batch": 64, "peak_mib": 12},
        settings | {"length": 32, "batch": 128, "peak_mib": 13},
        settings | {"length": "32", "batch": "64", "peak_mib": 14},  # as csv gives them back
    ]
    shown = one_line(rows)
    assert [r["peak_mib"] for r in shown] == [14, 13]
    assert plot(shown, tmp_path / "figure.png").read_bytes().startswith(PNG)
