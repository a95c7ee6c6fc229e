"""benchmarks.mine runs both sides on a tiny model, and notices other negatives."""

import json

import pytest

from benchmarks.mine import check


@pytest.mark.slow
def test_mining_is_compared_with_the_peers(tiny_base, tmp_path, run_benchmark):
    """Against the real peer: fp32 asserts equal negatives, veto loads the same cross-encoder."""
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    words = "red green blue fish whale fox apple pear".split()
    texts = [f"{words[n % 8]} {words[n // 8]} {n}" for n in range(64)]
    rows = [{"_id": f"d{n}", "text": t} for n, t in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"_id": f"q{n}", "text": f"{words[n]} ? {n}"} for n in range(8)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = [f"q{n}\td{9 * n}\t1\n" for n in range(8)]
    (folder / "qrels/train.tsv").write_text("".join(lines))
    options = ["--base", str(tiny_base), "--data", str(folder), "--rounds", "1"]
    cases = ["fp32", "veto"]
    found = run_benchmark("mine", *options, "--case", *cases)
    assert [row["name"] for row in found] == [f"mine {case}" for case in cases]
    assert all(row["rate"] > 0 and row["queries"] == 8 and row["passages"] == 64 for row in found)


def test_other_negatives_are_noticed():
    """Equal scores may change places; another score is another result."""
    theirs = {"q": [["a", 0.5], ["b", 0.4]]}
    check("fp32", {"q": [["a", 0.5], ["b", 0.400001]]}, theirs)
    check("defaults", {"q": [["a", 0.5], ["c", 0.3]]}, theirs)
    with pytest.raises(SystemExit, match="other negatives for 'q'"):
        check("fp32", {"q": [["a", 0.5], ["c", 0.3]]}, theirs)
    with pytest.raises(ValueError, match="zip"):
        check("fp32", {"q": [["a", 0.5]]}, theirs)
