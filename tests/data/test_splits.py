"""Splits share no text and do not depend on row order; the leakage report finds what is there."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from conf.schema import SourceConfig
from data.formats import Example, content_hash, normalise, read_examples
from data.splits import (
    SPLITS,
    Assignment,
    component_keys,
    incidences,
    leakage_report,
    split_by_components,
    split_examples,
)

ROOT = Path(__file__).parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"


def example(
    query: str, *positives: str, negatives: tuple[str, ...] = (), where: str = "f:1"
) -> Example:
    return Example(query, list(positives), list(negatives), where, where)


def random_examples(num: int, *, num_passages: int, seed: int) -> list[Example]:
    rng = random.Random(seed)
    return [
        example(
            f"query {rng.randrange(num)}",
            *(f"passage {rng.randrange(num_passages)}" for _ in range(rng.choice([1, 1, 1, 2]))),
            where=f"rows.jsonl:{i}",
        )
        for i in range(num)
    ]


def brute_force_groups(examples: list[Example]) -> set[frozenset[int]]:
    """Flood fill over rows that share a text: quadratic, but plainly right."""
    owned = [{normalise(t) for t in (e.query, *e.positives)} for e in examples]
    left, groups = set(range(len(examples))), set()
    while left:
        group, frontier = set(), {left.pop()}
        while frontier:
            row = frontier.pop()
            group.add(row)
            near = {r for r in left if owned[r] & owned[row]}
            left -= near
            frontier |= near
        groups.add(frozenset(group))
    return groups


@pytest.mark.parametrize("num_passages", [40, 150, 1000])
def test_components_equal_a_flood_fill(num_passages: int) -> None:
    """A missed link puts one passage into train and test; sparse and dense graphs."""
    examples = random_examples(200, num_passages=num_passages, seed=num_passages)
    row_E, text_E, num_rows = incidences(examples)
    key_R = component_keys(row_E, text_E, num_rows=num_rows)
    groups = {frozenset(np.flatnonzero(key_R == k).tolist()) for k in np.unique(key_R)}
    assert groups == brute_force_groups(examples)
    for group in groups:  # the key is the smallest hash of the component's texts
        hashes = [
            content_hash(t) for r in group for t in (examples[r].query, *examples[r].positives)
        ]
        assert {int(key_R[r]) for r in group} == {min(hashes)}


def test_no_text_is_in_two_splits_and_fractions_are_met() -> None:
    """The point of it all, over several seeds; spaces and Unicode forms do not part a text."""
    examples = random_examples(600, num_passages=900, seed=1)
    examples += [
        example("caf\u00e9 ?", "x 1"),
        example("cafe\u0301  ?", "x 2"),
        example("b", " x  2"),
    ]
    for seed in range(5):
        found = split_examples(examples, dev_fraction=0.1, test_fraction=0.2, seed=seed)
        parts = {name: list(found.select(examples, name)) for name in SPLITS}
        assert sorted(e.where for p in parts.values() for e in p) == sorted(
            e.where for e in examples
        )
        owned = {
            n: {normalise(t) for e in p for t in (e.query, *e.positives)} for n, p in parts.items()
        }
        assert not any(owned[a] & owned[b] for a, b in combinations(SPLITS, 2))
        assert {n: len(p) for n, p in parts.items()} == found.info["rows"]
        # the last component that fits may leave a row open
        assert abs(len(parts["dev"]) - 60) <= 1 and abs(len(parts["test"]) - 121) <= 1


def test_held_out_rows_have_a_limit_that_small_data_does_not_reach() -> None:
    """Held-out rows are kept in memory: of a file larger than memory a tenth would not fit."""
    examples = random_examples(600, num_passages=900, seed=1)
    free = split_examples(examples, dev_fraction=0.1, test_fraction=0.2, seed=0)
    same = split_examples(examples, dev_fraction=0.1, test_fraction=0.2, seed=0, max_held_out=500)
    assert same.info["digest"] == free.info["digest"]
    rows = split_examples(
        examples, dev_fraction=0.1, test_fraction=0.2, seed=0, max_held_out=40
    ).info["rows"]
    assert 39 <= rows["dev"] <= 40 and 39 <= rows["test"] <= 40 and sum(rows.values()) == 600


def test_split_follows_seed_and_texts_but_not_row_order() -> None:
    """Reshuffled files and other machines must give the same held-out rows; another seed others."""
    examples = random_examples(300, num_passages=500, seed=2)
    shuffled = examples.copy()
    random.Random(0).shuffle(shuffled)

    def held_out(rows: list[Example], seed: int) -> tuple[set[str], str]:
        found = split_examples(rows, dev_fraction=0.1, test_fraction=0.1, seed=seed)
        return {e.where for e in found.select(rows, "test")}, found.info["digest"]

    assert held_out(examples, 0) == held_out(shuffled, 0)
    assert held_out(examples, 0) != held_out(examples, 1)


def test_info_is_small_plain_data_for_result_files() -> None:
    """It is written into result.json: numpy numbers would fail there."""
    found = split_examples(
        random_examples(50, num_passages=90, seed=3), dev_fraction=0.1, test_fraction=0.1, seed=7
    )
    info = json.loads(json.dumps(found.info))
    assert info == found.info and info["seed"] == 7
    assert set(info) == {
        "method",
        "seed",
        "fractions",
        "max_held_out",
        "rows",
        "components",
        "largest_component",
        "digest",
    }


def test_giant_component_goes_to_train_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """One boilerplate passage ties most rows: held-out rows come from the rest, and it is said."""
    tied = [example(f"q{i}", "boilerplate") for i in range(95)]
    free = [example(f"free {i}", f"own {i}") for i in range(5)]
    with caplog.at_level(logging.WARNING):
        found = split_examples(tied + free, dev_fraction=0.1, test_fraction=0.1, seed=0)
    assert set(found.split_R[:95].tolist()) == {0}
    assert found.info["rows"]["train"] == 95
    assert {found.info["rows"]["dev"], found.info["rows"]["test"]} == {2, 3}
    assert "95 (95.0%), is in train" in caplog.text
    caplog.clear()
    split_examples(free * 3, dev_fraction=0.2, test_fraction=0.2, seed=0)
    assert not caplog.records  # whole components of 3 rows fit 20% of 15 exactly


def test_train_keeps_a_row_and_wrong_fractions_are_errors() -> None:
    """Tiny data: of three rows at 10% each, every split still gets one."""
    rows = [example(f"q{i}", f"p{i}") for i in range(3)]
    found = split_examples(rows, dev_fraction=0.1, test_fraction=0.1, seed=0)
    assert found.info["rows"] == {"train": 1, "dev": 1, "test": 1}
    one = split_examples(rows[:1], dev_fraction=0.1, test_fraction=0.1, seed=0)
    assert one.info["rows"] == {"train": 1, "dev": 0, "test": 0}
    none = split_examples(rows, dev_fraction=0.0, test_fraction=0.0, seed=0)
    assert none.info["rows"]["train"] == 3
    with pytest.raises(ValueError, match="together below 1"):
        split_examples(rows, dev_fraction=0.5, test_fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="cannot split 0 rows"):
        split_examples([], dev_fraction=0.1, test_fraction=0.1, seed=0)


def test_select_refuses_data_that_changed() -> None:
    """Row numbers of another file would put test rows into train."""
    rows = [example(f"q{i}", f"p{i}") for i in range(5)]
    found = Assignment(np.zeros(5, dtype=np.int8), {})
    with pytest.raises(ValueError, match="expected 5 rows, found 4"):
        list(found.select(rows[:4], "train"))
    with pytest.raises(ValueError, match="expected 5 rows, found more"):
        list(found.select([*rows, rows[0]], "train"))


def test_a_million_rows_split_in_seconds() -> None:
    """Plain Python over rows would take a minute; 30 s is room for a busy machine (2 s here)."""
    rng = np.random.default_rng(0)
    num = 1_000_000
    row_E = np.repeat(np.arange(num), 2)
    text_E = rng.integers(0, 2**62, 2 * num)
    text_E[1::2] = text_E[1::2][rng.integers(0, num // 3, num)]  # about three rows a passage
    start = time.perf_counter()
    found = split_by_components(
        row_E, text_E, num_rows=num, dev_fraction=0.1, test_fraction=0.1, seed=0
    )
    assert time.perf_counter() - start < 30
    assert abs(found.info["rows"]["test"] - num // 10) <= 3
    # sharing a passage means sharing the split
    order = np.argsort(text_E[1::2], kind="stable")
    same = np.diff(text_E[1::2][order]) == 0
    assert (np.diff(found.split_R[order])[same] == 0).all()


def test_split_and_report_do_not_depend_on_the_hash_seed() -> None:
    """Sets and hash() change from run to run; the split may not."""
    program = (
        "import sys; sys.path.insert(0, 'tests/data'); from test_splits import *\n"
        "e = random_examples(200, num_passages=150, seed=5)\n"
        "s = split_examples(e, dev_fraction=.1, test_fraction=.1, seed=0)\n"
        "print(s.info, s.split_R.tolist(), leakage_report({'a': e[:100], 'b': e[100:]}))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# -- leakage ------------------------------------------------------------------------------------


def shingles(text: str) -> set[str]:
    plain = "".join(c for c in normalise(text).casefold() if c.isalnum())[:1000]
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


def test_exact_leaks_are_counted_by_kind_with_their_places() -> None:
    """Each kind of shared text means another thing; all but negatives in train are plain leaks."""
    train = [
        example("same query", "passage one here", negatives=("held-out answer",), where="t:1"),
        example("other query", "same passage", where="t:2"),
        example("train question", "quoted text", where="t:3"),
    ]
    test = [
        example("same  query", "passage two there", where="e:1"),
        example("third", "same passage", where="e:2"),
        example("quoted text", "held-out answer", where="e:3"),
        example("fourth", "train question", where="e:4"),
    ]
    pair = leakage_report({"train": train, "test": test})["pairs"]["train/test"]
    counts = {k: v for k, v in pair.items() if k.startswith("exact")}
    assert counts == {
        "exact_queries": 1,
        "exact_positives": 1,
        "exact_negatives": 1,
        "exact_across": 2,
    }
    shown = {(e["kind"], *e["where"]) for e in pair["examples"] if e["kind"].startswith("exact")}
    assert shown == {
        ("exact_queries", "t:1", "e:1"),
        ("exact_positives", "t:2", "e:2"),
        ("exact_negatives", "t:1", "e:3"),
        ("exact_across", "t:3", "e:4"),
        ("exact_across", "t:3", "e:3"),
    }
    json.dumps(pair)


def test_near_duplicates_equal_an_exhaustive_comparison() -> None:
    """MinHash may miss pairs and must invent none: against all pairs by sets of strings."""
    rng = random.Random(0)
    words = [f"w{i:03d}" for i in range(200)]
    train = [
        example(f"q{i}", " ".join(rng.choices(words, k=40)), where=f"t:{i}") for i in range(120)
    ]
    test = []
    for i in range(120):  # up to six words changed
        new = train[i].positives[0].split()
        for place in rng.sample(range(40), rng.randrange(0, 7)):
            new[place] = rng.choice(words)
        test.append(example(f"r{i}", " ".join(new), where=f"e:{i}"))
    for threshold in (0.8, 0.9):
        report = leakage_report(
            {"train": train, "test": test}, threshold=threshold, num_examples=200
        )
        pair = report["pairs"]["train/test"]
        found = {
            tuple(e["where"]): e["similarity"]
            for e in pair["examples"]
            if e["kind"] == "near_positives"
        }
        wanted = {}
        for b in test:
            if any(b.positives == a.positives for a in train):
                continue  # an exact one
            one = shingles(b.positives[0])
            similar = [
                (len(one & (o := shingles(a.positives[0]))) / len(one | o), a) for a in train
            ]
            best, a = max(similar, key=lambda s: s[0])
            if best >= threshold:
                wanted[a.where, b.where] = round(best, 4)
        assert len(wanted) > 5
        assert found == wanted and pair["near_positives"] == len(wanted)


def test_near_duplicates_see_through_case_punctuation_and_any_script() -> None:
    """Trivial edits are the usual leak; short texts and scripts without spaces must not crash."""
    train = [
        example("What is Ray Serve used for?", "a"),
        example("\u0645\u0627 \u0647\u0648 \u0627\u0644\u0642\u0631\u0622\u0646\u061f", "!?"),
        example("ok", "b"),
    ]
    test = [
        example("what is ray serve used for", "c"),
        example("\u0645\u0627 \u0647\u0648 \u0627\u0644\u0642\u0631\u0622\u0646", "\u3042"),
        example("OK", "d"),
    ]
    pair = leakage_report({"train": train, "test": test})["pairs"]["train/test"]
    assert pair["near_queries"] == 3 and pair["near_positives"] == 0


def test_report_is_bounded_and_says_so() -> None:
    """Near duplicates are searched among max_texts texts; exact ones among all."""
    train = [example(f"query number {i}", f"passage {i}", where=f"t:{i}") for i in range(60)]
    report = leakage_report({"train": train, "dev": train[:30]}, max_texts=20)
    assert report["not_compared_for_near"] == 2 * 40 + 2 * 10
    assert report["pairs"]["train/dev"]["exact_queries"] == 30
    assert report["texts"]["train"] == {"queries": 60, "positives": 60, "negatives": 0}
    assert len(report["pairs"]["train/dev"]["examples"]) == 10
    with pytest.raises(ValueError, match="threshold"):
        leakage_report({"train": train}, threshold=0)


@pytest.mark.skipif(not DATASETS.is_dir(), reason="no ../shared/datasets here")
def test_real_splits_share_what_their_notes_say() -> None:
    """No query is in two splits; SciFact shares abstracts between them, as its notes say."""
    for name in ("en_scifact", "fa_farstail"):
        source = SourceConfig(root=str(DATASETS / name))
        splits = {split: list(read_examples(source, split)) for split in ("train", "test")}
        pair = leakage_report(splits)["pairs"]["train/test"]
        assert pair["exact_queries"] == 0
        owned = [{p for e in rows for p in e.positives} for rows in splits.values()]
        assert pair["exact_positives"] == len(owned[0] & owned[1])
        assert (pair["exact_positives"] > 100) == (name == "en_scifact")
