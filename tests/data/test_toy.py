"""The toy set is the same everywhere, has no leak, and leaves something to learn."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.splits import leakage_report
from data.toy import SIZES, toy_examples


def test_the_set_is_the_same_in_another_process():
    """Sets and hashes differ between processes (PYTHONHASHSEED)."""
    code = (
        "import sys; sys.path.insert(0, '.'); from data.toy import toy_examples;"
        "print(repr([(e.query, e.positives, e.negatives) for e in toy_examples('train')]))"
    )
    outs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    here = repr([(e.query, e.positives, e.negatives) for e in toy_examples("train")])
    assert outs[0] == outs[1] == here + "\n"
    assert toy_examples("train", seed=1)[0].query != toy_examples("train")[0].query


def test_splits_share_no_text():
    by_split = {s: toy_examples(s) for s in SIZES}
    assert {s: len(e) for s, e in by_split.items()} == SIZES
    for counts in leakage_report(by_split)["pairs"].values():
        assert not any(n for kind, n in counts.items() if kind.startswith("exact"))
    texts = [t for e in by_split["train"] for t in (e.query, *e.positives, *e.negatives)]
    assert len(set(texts)) == len(texts)
    assert {len(e.positives) for e in by_split["train"]} == {1, 2}
    assert {len(e.negatives) for e in by_split["train"]} == {0, 1}


def test_word_overlap_finds_some_answers_and_translation_the_rest():
    """Too easy (all found by words) or unlearnable, and a test of training on it would show
    nothing.
    """
    test = toy_examples("test")
    fillers = set("the of and is a to in for with on".split())
    queries = [set(e.query.split()) - fillers for e in test]
    passages = [set(e.positives[0].split()) - fillers for e in test]

    def accuracy(queries):
        overlap = np.array([[len(q & p) for p in passages] for q in queries])
        return float((overlap.argmax(1) == np.arange(len(test))).mean())

    # words that go together in training pairs translate each other
    pairs = {}
    for e in toy_examples("train"):
        for q in set(e.query.split()) - fillers:
            for p in set(e.positives[0].split()) - fillers:
                pairs.setdefault(q, {}).setdefault(p, 0)
                pairs[q][p] += 1
    translated = [
        q | {w for t in q for w, n in pairs.get(t, {}).items() if n >= 0.5 * max(pairs[t].values())}
        for q in queries
    ]
    assert 0.1 < accuracy(queries) < 0.8
    assert accuracy(translated) > accuracy(queries) + 0.1


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="splits train, dev, test, not 'validation'"):
        toy_examples("validation")
