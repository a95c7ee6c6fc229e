"""Hard negatives against brute force, on both sides of the sign, and from caches that went bad."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conf.schema import MineConfig, ModelConfig, PrepareConfig, SourceConfig
from data import candidates, negatives, teacher
from data.candidates import Bm25Source, ModelSource, RunSource
from data.formats import read_examples
from data.negatives import Negative, choose, limits, mine_file
from data.pool import Pool, read_pool
from data.records import BadRows, content_hash
from data.rows import row_of
from data.triplets import triplets_of
from models.build import build_model
from models.export import export

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NO_LIMITS = {"fraction": None, "near_duplicate": None}


@pytest.fixture
def grid(monkeypatch):
    """23 queries, 90 passages in parts of 32; scores are small multiples of 1/64 in any precision
    and any order of summation, many of them equal."""
    monkeypatch.setattr(candidates, "PART_TEXTS", 32)
    rng = np.random.default_rng(0)
    pool = Pool()
    for n in range(90):
        pool.docs.add(f"passage {n} {'abcdefgh'[n % 8] * 9}", f"{n * 7919 % 1000}")
    for q in range(23):
        # the last query has no passage that is none of its answers
        own = range(90) if q == 22 else rng.choice(90, rng.integers(1, 5), replace=False)
        pool.add(f"query {q}", f"q{q}", [int(d) for d in own])
    q_QD, p_ND = (rng.integers(-8, 9, (n, 6)).astype(np.float32) / 8 for n in (23, 90))
    parts = [p_ND[low : low + 32] for low in range(0, 90, 32)]
    scores_QN = q_QD.astype(np.float64) @ p_ND.astype(np.float64).T
    return pool, ModelSource(pool, q_QD, parts, CPU), scores_QN


def brute_force(pool: Pool, scores_QN: np.ndarray, c: MineConfig) -> list[list[int]]:
    """The definition, one query and passage at a time."""
    mined = []
    for q, score_N in enumerate(scores_QN):
        ids, positives = pool.docs.ids, pool.positives[q]
        order = sorted(range(len(ids)), key=lambda d: ids[d].encode(), reverse=True)
        order = [d for d in sorted(order, key=lambda d: -score_N[d]) if d not in positives]
        lowest = min(score_N[d] for d in positives)
        kept = []
        for d in order[c.first_rank - 1 : c.last_rank]:
            ok = c.margin is None or lowest - score_N[d] >= c.margin
            ok &= c.fraction is None or score_N[d] <= lowest - (1 - c.fraction) * abs(lowest)
            ok &= c.max_score is None or score_N[d] <= c.max_score
            ok &= c.min_score is None or score_N[d] >= c.min_score
            kept += [d] if ok else []
        mined.append(kept[: c.num_negatives])
    return mined


SETTINGS = [
    {},
    {"num_negatives": 1},
    {"num_negatives": 7, "first_rank": 4, "last_rank": 9},
    {"num_negatives": 200, "last_rank": 200},
    {"margin": 0.0},
    {"margin": -0.25, "num_negatives": 40},
    {"fraction": 0.75, "num_negatives": 10},
    {"fraction": 1.25, "max_score": 0.5, "num_negatives": 10},
    {"min_score": 0.25, "max_score": 0.75, "num_negatives": 90, "last_rank": 90},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_mining_equals_brute_force(grid, settings):
    """Ranks, limits and ties, over passages that are searched part by part.

    Scores are exact in float32, so that equal means equal.
    """
    pool, source, scores_QN = grid
    c = MineConfig(**NO_LIMITS | settings)
    mined = choose(pool, {"model": source}, c, seed=0, judge=source)
    expected = brute_force(pool, scores_QN, c)
    assert [[n.doc for n in some] for some in mined.negatives] == expected
    assert sum(map(len, expected)) == mined.counts["mined"] > 0
    for q, some in enumerate(mined.negatives):
        assert [n.scores["model"] for n in some] == [scores_QN[q, n.doc] for n in some]


def test_a_query_whose_every_passage_answers_it_gets_none(grid):
    """A search that asks for too few hits finds answers alone, or pads with passage -1."""
    pool, source, _ = grid
    mined = choose(pool, {"model": source}, MineConfig(**NO_LIMITS), seed=0, judge=source)
    assert mined.negatives[22] == [] and mined.counts["queries with none"] == 1
    assert all(len(some) == 3 for some in mined.negatives[:22])
    assert not any(n.doc in pool.positives[q] for q, s in enumerate(mined.negatives) for n in s)


@pytest.mark.parametrize(
    ("positive", "fraction", "margin", "highest"),
    [
        (0.8, 0.95, None, 0.76),
        (-0.8, 0.95, None, -0.84),  # as a factor: -0.76, above the positive
        (0.0, 0.95, None, 0.0),
        (0.8, None, 0.1, 0.7),
        (-0.8, None, 0.1, -0.9),
        (-0.8, 0.95, 0.1, -0.9),
        (0.8, 0.5, 0.1, 0.4),
        (-0.8, 1.05, None, -0.76),
        (12.0, 0.95, None, 11.4),
    ],
)
def test_limits_on_both_sides_of_the_sign(positive, fraction, margin, highest):
    """A share of a negative score as a factor lets negatives through that outscore the positive."""
    c = MineConfig(fraction=fraction, margin=margin)
    assert limits(positive, c) == (-np.inf, pytest.approx(highest))
    if (fraction is None or fraction <= 1) and (margin is None or margin >= 0):
        assert limits(positive, c)[1] <= positive


def test_a_bm25_score_is_compared_with_the_positives_bm25_score():
    """A positive below the first hits has no score among them; it must be computed."""
    pool = Pool()
    texts = ["red fish", "blue fish blue", "red red apple", "stone", "red fish river stone"]
    for n, text in enumerate(texts):
        pool.docs.add(text, f"d{n}")
    pool.add("red fish", "q0", [4])
    pool.add("stone", "q1", [0])  # shares no word with its positive: nothing may score more
    source = Bm25Source(pool)
    score_N = source.pair_scores(np.zeros(5, int), np.arange(5))
    docs_QK, scores_QK = source.best(5)
    found = {d: s for d, s in zip(docs_QK[0], scores_QK[0], strict=True) if d >= 0}
    # another order of the same float32 sums
    np.testing.assert_allclose([score_N[d] for d in found], list(found.values()), rtol=1e-6)
    assert score_N[3] == 0 and 3 not in found
    c = MineConfig(sources=["bm25"], fraction=1.0, near_duplicate=None, num_negatives=5)
    mined = choose(pool, {"bm25": source}, c, seed=0)
    assert [n.doc for n in mined.negatives[0]] == [d for d in found if score_N[d] < score_N[4]]
    assert mined.negatives[1] == []


def test_equal_and_nearly_equal_texts_are_no_negatives():
    """An answer that stands in the corpus twice, or with another full stop, teaches nonsense."""
    long = "The river rises in the northern mountains and flows through four countries to the sea"
    pool = Pool()
    texts = [long, f"{long}.", "  ".join(long.split()), "Who asks?", "Another mountain altogether"]
    numbers = [pool.docs.add(text, f"d{n}") for n, text in enumerate(texts)]
    assert numbers == [0, 1, 0, 2, 3]  # white space apart the third is the first
    pool.add("Who asks?", "q", [0])
    source = Bm25Source(pool)
    everything = np.tile(np.arange(4), (1, 1)), np.ones((1, 4), np.float32)
    source.best = lambda k, queries: everything
    c = MineConfig(sources=["bm25"], fraction=None)
    mined = choose(pool, {"bm25": source}, c, seed=0)
    assert [n.doc for n in mined.negatives[0]] == [3]
    assert mined.counts["nearly a positive"] == 1
    assert long[:40] in mined.examples["nearly a positive"][0]
    mined = choose(pool, {"bm25": source}, MineConfig(**NO_LIMITS, sources=["bm25"]), seed=0)
    assert [n.doc for n in mined.negatives[0]] == [1, 3]  # still without the question itself


def test_several_sources_take_turns_and_are_judged_by_the_model(grid):
    """A union on two scales must not compare a BM25 score with a cosine."""
    pool, model, scores_QN = grid
    rows = [[int(d) for d in np.random.default_rng(q).permutation(90)[:12]] for q in range(23)]
    other = SimpleNamespace(
        best=lambda k, queries: (np.array(rows), np.tile(np.arange(112.0, 100, -1), (23, 1))),
        pair_scores=lambda q, d: np.full(len(d), 100.0, np.float32),
    )
    c = MineConfig(
        sources=["model", "bm25"], model="x", margin=-1.0, fraction=None, near_duplicate=None,
        num_negatives=8, last_rank=6,
    )  # fmt: skip
    mined = choose(pool, {"model": model, "bm25": other}, c, seed=0, judge=model)
    by_model = brute_force(pool, scores_QN, MineConfig(**NO_LIMITS, num_negatives=6, last_rank=6))
    for q, some in enumerate(mined.negatives[:22]):
        by_bm25 = [d for d in rows[q] if d not in pool.positives[q]][:6]
        turns = [d for pair in zip(by_model[q], by_bm25, strict=True) for d in pair]
        lowest = min(scores_QN[q, d] for d in pool.positives[q])
        kept = [d for d in dict.fromkeys(turns) if scores_QN[q, d] <= lowest + 1.0]
        assert [n.doc for n in some] == kept[:8]
        assert all(n.scores["model"] == scores_QN[q, n.doc] for n in some)
    assert {n.source for some in mined.negatives for n in some} == {"model", "bm25"}
    with pytest.raises(ValueError, match=r"mine\.margin needs one scale"):
        MineConfig(sources=["bm25", "run"], margin=0.1)


def test_a_sample_depends_on_its_query_and_the_seed_alone(grid):
    """One generator for all queries: a query more, and every later sample is another."""
    pool, source, scores_QN = grid
    c = MineConfig(**NO_LIMITS, choice="sample", num_negatives=4, last_rank=12)

    def sample(seed: int, rows: slice = slice(0, 23)) -> list[list[int]]:
        part = Pool()
        part.docs = pool.docs
        for q in range(23)[rows]:
            part.add(pool.queries.texts[q], pool.queries.ids[q], pool.positives[q])
        some = ModelSource(part, source.q_QD[rows], source.parts, CPU)
        mined = choose(part, {"model": some}, c, seed=seed, judge=some)
        return [[n.doc for n in row] for row in mined.negatives]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, slice(22, 5, -1))[::-1] == sample(1)[6:]
    eligible = brute_force(pool, scores_QN, MineConfig(**NO_LIMITS, num_negatives=12, last_rank=12))
    drawn = Counter()
    for seed in range(120):
        for row, of in zip(sample(seed)[:22], eligible[:22], strict=True):
            ranks = [of.index(d) for d in row]
            assert ranks == sorted(set(ranks))  # hardest first, none twice
            drawn.update(ranks)
    # 2,640 draws of 4 among 12: each rank 880 times, standard deviation 24
    assert len(drawn) == 12 and all(abs(n - 880) < 120 for n in drawn.values())


class Judge:
    """Probability of an answer by number, in place of a cross-encoder."""

    def __init__(self, probability_N: np.ndarray) -> None:
        self.probability_N, self.asked = probability_N, []

    def scores(self, pairs, what):
        self.asked.append([tuple(p) for p in pairs])
        return self.probability_N[[d for _, d in pairs]].astype(np.float32)

    def probability(self, score_P):
        return score_P


@pytest.mark.parametrize("choice", ["top", "sample"])
def test_veto_in_rounds_gives_what_judging_everything_gives(grid, choice):
    """Asked about what would be taken alone, a cross-encoder costs a tenth; the result must be that
    of asking about all."""
    pool, source, _ = grid
    probability_N = np.random.default_rng(1).random(90)
    c = MineConfig(
        **NO_LIMITS, choice=choice, num_negatives=4, last_rank=20, veto_above=0.4, reranker="x"
    )
    veto = Judge(probability_N)
    mined = choose(pool, {"model": source}, c, seed=0, judge=source, veto=veto)
    everything = MineConfig(**NO_LIMITS, choice=choice, num_negatives=20, last_rank=20)
    for q, some in enumerate(mined.negatives):
        whole = choose(pool, {"model": source}, everything, seed=0, judge=source).negatives[q]
        if choice == "sample":
            rng = np.random.default_rng([0, content_hash(pool.queries.texts[q])])
            whole = [whole[i] for i in rng.permutation(len(whole))]
        kept = [n.doc for n in whole if probability_N[n.doc] <= np.float32(0.4)][:4]
        assert sorted(n.doc for n in some) == sorted(kept)
        assert all(n.scores["reranker"] == np.float32(probability_N[n.doc]) for n in some)
    asked = [pair for pairs in veto.asked for pair in pairs]
    assert len(asked) == len(set(asked)) == mined.counts["vetoed"] + mined.counts["mined"]
    assert len(asked) < 23 * 20 * 0.6
    assert len(veto.asked[0]) == 22 * 4  # one batch for all queries


@pytest.mark.parametrize("limit", [("BLOCK_QUERIES", 2), ("BLOCK_HITS", 120)], ids=str)
@pytest.mark.parametrize("choice", ["top", "sample"])
def test_blocks_of_queries_change_nothing(grid, tmp_path, monkeypatch, choice, limit):
    """With a veto, of all sources: what is chosen for a query, and every score and rank."""
    pool, source, scores_QN = grid
    c = MineConfig(
        sources=["model", "bm25", "run"], model="x", run="x", choice=choice, num_negatives=4,
        last_rank=20, margin=-1.0, near_duplicate=0.9, veto_above=0.4, reranker="x",
    )  # fmt: skip
    probability_N = np.random.default_rng(1).random(90)
    listed = ((q, d) for q in range(23) for d in range(q, 90, 4))
    lines = (f"q{q} Q0 {pool.docs.ids[d]} 1 {-scores_QN[q, d]} x\n" for q, d in listed)
    (tmp_path / "run.trec").write_text("".join(lines))
    run = RunSource(pool, tmp_path / "run.trec")
    sources = {"model": source, "bm25": Bm25Source(pool), "run": run}

    def mined():
        return choose(pool, sources, c, seed=0, judge=source, veto=Judge(probability_N))

    whole = mined()
    monkeypatch.setattr(negatives, *limit)
    assert len(list(negatives._blocks(pool, c))) > 5
    parts = mined()
    assert parts.negatives == whole.negatives and sum(map(len, whole.negatives)) > 40
    assert parts.positive_scores == whole.positive_scores and parts.counts == whole.counts
    assert whole.counts["vetoed"] and whole.counts["outside the limits"]


def test_one_query_with_many_answers_does_not_deepen_the_others_candidates(grid, monkeypatch):
    """Room for the answers of one topic, times all queries, is more than memory holds."""
    pool, source, _ = grid
    monkeypatch.setattr(negatives, "BLOCK_HITS", 120)
    asked = []
    best = source.best
    monkeypatch.setattr(source, "best", lambda k, of: asked.append((k, of)) or best(k, of))
    choose(pool, {"model": source}, MineConfig(**NO_LIMITS, last_rank=6), seed=0, judge=source)
    assert [q for _, of in asked for q in range(of.start, of.stop)] == list(range(23))
    assert asked[-1] == (90, slice(22, 23))  # every passage answers it
    assert len(asked) == 4 and all(k <= 6 + 4 + 1 for k, _ in asked[:-1])


# ------------------------------------------------------------------------------------------- files

WORDS = "red green blue fish whale fox apple pear stone river mountain cloud".split()


@pytest.fixture
def beir(tmp_path) -> Path:
    """50 passages of three words, 20 queries of two, on each side two that are equal."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"{' '.join(rng.choice(WORDS, 3))} {n}" for n in range(50)]
    texts[7] = texts[31]
    corpus = [{"_id": f"d{n}", "title": "", "text": t} for n, t in enumerate(texts)]
    queries = [{"_id": f"q{n}", "text": f"{' '.join(rng.choice(WORDS, 2))} {n}"} for n in range(20)]
    queries[4]["text"] = queries[11]["text"]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    rows = [f"q{q}\td{rng.integers(50)}\t{1 + q % 2}" for q in range(20)] + [
        "q4\td31\t1",
        "q5\td0\t0",
    ]
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def mine(tmp_path, tiny_base):
    """mine(data, **settings of MineConfig) -> (report, rows); source: what a stage made of data."""

    def run(
        data: Path, *, source: Path | None = None, seed: int = 0, columns=None, **settings
    ) -> tuple[dict, list[dict]]:
        settings = {"model": str(tiny_base)} | NO_LIMITS | settings
        c = PrepareConfig(
            stages=["mine"], data=str(data), out=str(tmp_path), device="cpu", seed=seed,
            precision="fp32", cache_dir=str(tmp_path / "cache"), mine=MineConfig(**settings),
            columns=columns or {},
        )  # fmt: skip
        target = tmp_path / "mine.jsonl"
        report = mine_file(c, source or data, target)
        return report, [json.loads(line) for line in target.read_text().splitlines()]

    return run


def test_positives_are_merged_by_content(beir, mine):
    """q4 and q11 ask the same; d7 and d31 are one text: neither may be the other's negative."""
    report, rows = mine(beir, num_negatives=60, last_rank=60)
    assert report["in"] == report["out"] == len(rows) == 19
    row = next(r for r in rows if r["query_id"] == "q4")
    qrels = [line.split("\t") for line in (beir / "qrels/train.tsv").read_text().splitlines()]
    answers = {d for q, d, _ in qrels if q in ("q4", "q11")} | {"d7"}
    assert set(row["positive_ids"]) == answers - {"d31"}  # which is d7 by its text
    for r in rows:
        assert len(r["negative"]) == 49 - len(r["positive"])  # 50 passages, two of them equal
        assert not set(r["negative"]) & set(r["positive"])
        # of q4 the second answer is q11's, which has grade 2
        assert ("positive_grades" in r) == (r["query_id"] == "q4" or int(r["query_id"][1:]) % 2)


def test_rows_are_training_data_and_keep_their_provenance(beir, mine, tiny_base):
    """A key that the readers take for something else (scores, labels) would change the training."""
    report, rows = mine(beir, sources=["model", "bm25"], fraction=0.95)
    for row in rows:
        assert len(row["mined"]) == len(row["negative"]) == len(row["negative_ids"])
        for found in row["mined"]:
            assert found["source"] in ("model", "bm25") and found["ranks"][found["source"]] >= 1
            assert found["scores"]["model"] <= found["positive"]["model"]
            assert found["model"] == teacher.model_digest(tiny_base)[:12]
            assert found["settings"] == report["digests"]["settings"]
    assert "positive_scores" not in rows[0]


def test_mined_rows_read_back_as_they_were_written(beir, mine, tmp_path):
    """Through data.formats: what train.py and the next stage see."""
    _, rows = mine(beir)
    examples = list(
        read_examples(SourceConfig(root=str(tmp_path / "mine.jsonl")), None, BadRows("error"))
    )
    assert [(e.id, e.query, e.positives, e.negatives, e.negative_ids) for e in examples] == [
        (r["query_id"], r["query"], r["positive"], r["negative"], r["negative_ids"]) for r in rows
    ]
    assert all(e.positive_scores is None and e.negative_scores is None for e in examples)


def test_own_negatives_stay_first_and_are_not_mined_again(tmp_path, mine):
    """Natural negatives are worth more than mined ones; one in both would count twice."""
    path = tmp_path / "rows.jsonl"
    pairs = [(f"ask {n}", f"answer {n}", [f"answer {(n + 1) % 9}"]) for n in range(9)]
    rows = [{"anchor": q, "pos": p, "neg": n} for q, p, n in pairs]
    rows += [{"anchor": "ask 3", "pos": "answer 4", "neg": ["answer 0"]}]  # 4 answers it after all
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"columns": {"query": "anchor"}, "num_negatives": 50, "last_rank": 50}
    _, mined = mine(path, **settings)
    for n, row in enumerate(mined):
        own = ["answer 0"] if n == 3 else [f"answer {(n + 1) % 9}"]
        assert row["negative"][0] == own[0] and row["mined"][0] == {"source": "data"}
        assert len(row["negative"]) == len(set(row["negative"])) == 9 - len(row["positive"])
        assert row["query_id"] == f"q{n}"  # made up: the place in a file is no id
    assert mined[3]["positive"] == ["answer 3", "answer 4"]
    _, mined = mine(path, keep_own=False, **settings)
    # not kept, they are passages as others are: the hardest, often
    assert all(len(set(row["negative"])) == 9 - len(row["positive"]) for row in mined)
    assert all(m["source"] != "data" for row in mined for m in row["mined"])


def test_answers_that_a_stage_dropped_or_another_split_has_are_no_negatives(beir, mine, tmp_path):
    """A filter leaves a pair out for its length, not because the passage is no answer."""
    whole, kept = tmp_path / "whole.jsonl", tmp_path / "filter.jsonl"
    words = ("red fish", "blue bird", "old stone")
    rows = [{"query": w, "positive": f"{w} {end}"} for w in words for end in ("one", "two")]
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    answers = {(row["query"], row["positive"]) for row in rows}
    limits = {"num_negatives": 60, "last_rank": 60, "near_duplicate": None, "fraction": None}
    _, mined = mine(whole, source=kept, corpus=str(whole), **limits)
    found = {(row["query"], text) for row in mined for text in row["negative"]}
    assert found and not found & answers
    assert all(len(row["negative"]) == 4 for row in mined)

    query_id, doc_id = "q0", "d1"
    train = (beir / "qrels" / "train.tsv").read_text()
    assert f"{query_id}\t{doc_id}\t" not in train
    _, before = mine(beir, **limits)
    assert doc_id in next(r for r in before if r["query_id"] == query_id)["negative_ids"]
    test = f"query-id\tcorpus-id\tscore\n{query_id}\t{doc_id}\t1\n"
    (beir / "qrels" / "test.tsv").write_text(test)
    _, after = mine(beir, **limits)
    row = next(row for row in after if row["query_id"] == query_id)
    assert doc_id not in row["negative_ids"] and doc_id not in row["positive_ids"]


@pytest.fixture
def shared_ids(tmp_path) -> Path:
    """A BEIR folder whose query q1 is document q1 but for the title, as in ArguAna, and document d0
    to the letter; d1 and d2 answer it in split train, d3 in test."""
    folder = tmp_path / "fish"
    (folder / "qrels").mkdir(parents=True)
    corpus = {
        "q1": "what colour is the fish", "d1": "the fish is red", "d2": "the fish is blue",
        "d3": "the fish is the colour of stone", "d4": "what is the stone",
        "d5": "what colour is the river", "d0": "what colour is the fish",
    }  # fmt: skip
    rows = [{"_id": i, "title": "Fish" * (i == "q1"), "text": t} for i, t in corpus.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    query = {"_id": "q1", "text": corpus["q1"]}
    (folder / "queries.jsonl").write_text(json.dumps(query) + "\n")
    for split, docs in (("train", ("d1", "d2")), ("test", ("d3",))):
        lines = "".join(f"q1\t{d}\t1\n" for d in docs)
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.mark.parametrize("way", ["data", "corpus", "earlier stage", "earlier stage, corpus"])
def test_a_beir_folders_judgements_count_on_every_way_to_it(shared_ids, mine, tmp_path, way):
    """As mine.corpus, or behind an earlier stage, it is read as passages or as rows of one split;
    the rows' ids may be others than its own."""
    texts = {r["_id"]: r["text"] for r in map(json.loads, (shared_ids / "corpus.jsonl").open())}
    rows = [{"query_id": "a", "query": "what colour  is the fish", "positive": texts["d1"]}]
    rows += [{"query": f"ask {d}", "positive": texts[d]} for d in ("d2", "d3", "d4", "d5", "d0")]
    rows += [{"query": "ask q1", "positive": f"Fish {texts['q1']}"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = path if way == "corpus" else shared_ids
    source = shared_ids if way == "data" else path
    corpus = str(shared_ids) if "corpus" in way else None
    every = {"sources": ["bm25"], "model": None, "num_negatives": 9}
    _, mined = mine(data, source=source, corpus=corpus, **every)
    assert set(mined[0]["negative"]) == {texts["d4"], texts["d5"]}


@pytest.mark.parametrize("source", ["model", "bm25", "run"])
def test_a_query_that_is_a_document_is_no_negative_of_itself(
    shared_ids, mine, tmp_path, tiny_base, source
):
    """By its id, as BEIR's searches leave it out, where a title makes the texts differ. What is
    left out must not take the place of a candidate."""
    run = tmp_path / "run.trec"
    ranked = ("q1", "d0", "d1", "d2", "d3", "d5", "d4")
    run.write_text("".join(f"q1 Q0 {d} 1 {9 - n} x\n" for n, d in enumerate(ranked)))
    model = str(tiny_base) if source == "model" else None
    options = {"sources": [source], "model": model, "last_rank": 2}
    options |= {"run": str(run)} if source == "run" else {}
    _, (row,) = mine(shared_ids, **options)
    assert sorted(row["negative_ids"]) == ["d4", "d5"]
    assert sorted(m["ranks"][source] for m in row["mined"]) == [1, 2]


def test_copies_of_a_dropped_answer_and_own_copies_of_an_answer_are_no_negatives(tmp_path, mine):
    """Nearly a positive counts for whatever is known to answer, and for the data's own negatives:
    another capital letter in a copy trains the reverse."""
    whole, kept = tmp_path / "whole.jsonl", tmp_path / "filter.jsonl"
    fish, disk = "the red fish is called betta splendens", "Error 12: the disk is full."
    rows = [
        {"query": "red fish", "positive": "betta splendens"},
        {"query": "ask 1", "positive": f"Red fish: {fish}!"},
        {"query": "ask 2", "positive": f"{fish}."},
        {"query": "error", "positive": disk, "negative": ["error 12: the disk is full", "birds"]},
    ]
    dropped = {"query": "red fish", "positive": fish}
    whole.write_text("".join(json.dumps(row) + "\n" for row in [dropped, *rows]))
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = {"sources": ["bm25"], "model": None, "num_negatives": 9, "near_duplicate": 0.8}
    for corpus in (str(whole), None):  # the dropped answer is a passage, or is none
        report, mined = mine(whole, source=kept, corpus=corpus, **every)
        assert not any("betta" in text for text in mined[0]["negative"])
    assert mined[3]["negative"][0] == "birds" and mined[3]["mined"][0] == {"source": "data"}
    assert "error 12: the disk is full" not in mined[3]["negative"]
    counts = report["counts"]
    assert counts["own negatives"] == 2 and counts["own negatives nearly a positive"] == 1
    assert "the disk is full" in report["examples"]["own negatives nearly a positive"][0]
    _, mined = mine(whole, source=kept, **every | {"near_duplicate": None})
    assert sum("betta" in text for text in mined[0]["negative"]) == 2
    assert mined[3]["negative"][:2] == rows[3]["negative"]


def test_a_model_without_a_head_is_no_judge(beir, mine, tiny_base):
    """A fresh head vetoes at random, and its scores would be written as a teacher's."""
    with pytest.raises(ValueError, match=r"mine.reranker \(.*\) is no cross-encoder"):
        mine(beir, reranker=str(tiny_base))


def test_nothing_found_is_a_result(beir, mine, caplog):
    """Limits that nothing passes: rows with positives alone, and the report says so, and why."""
    report, rows = mine(beir, max_score=-2.0)
    assert "are outside the limits (mine.max_score=-2); null lifts" in caplog.text
    assert all(row["negative"] == row["mined"] == [] and row["positive"] for row in rows)
    assert report["counts"]["queries with none"] == len(rows) and report["counts"]["mined"] == 0


def test_a_larger_corpus_serves(beir, mine, tmp_path):
    """mine.corpus: pairs alone name few passages, all of them answers."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "red fish", "positive": "red fish 1", "id": 7}) + "\n")
    _, (row,) = mine(path, corpus=str(beir))
    assert len(row["negative"]) == 3 and set(row["negative_ids"]) <= {f"d{n}" for n in range(50)}
    _, (row,) = mine(path)
    assert row["negative"] == []
    others = tmp_path / "others.tsv"  # rows of any kind: their passages
    others.write_text("query\tpositive\tnegative\nx\tstone\triver\n")
    _, (row,) = mine(path, corpus=str(others))
    assert set(row["negative"]) == {"stone", "river"}
    with pytest.raises(ValueError, match="none: no such file or folder; want a BEIR folder"):
        mine(path, corpus=str(tmp_path / "none"))


def test_a_corpus_of_rows_is_read_whole_and_its_faults_name_it(tmp_path, mine):
    """It has no setting for its split; and a message that names data= sends one to the wrong
    file."""
    path, more = tmp_path / "pairs.jsonl", tmp_path / "more"
    path.write_text(json.dumps({"query": "red fish", "positive": "red fish 1"}) + "\n")
    more.mkdir()
    for split in ("train", "dev"):
        row = {"query": f"ask {split}", "positive": f"red {split}"}
        (more / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    every = {"sources": ["bm25"], "model": None}
    _, (row,) = mine(path, corpus=str(more), **every)
    assert set(row["negative"]) == {"red train", "red dev"}
    faulty = tmp_path / "faulty.jsonl"
    for rows, message in (
        ({"frage": "x", "positive": "y"}, r"faulty\.jsonl.*a query column.*rename them"),
        ({"query": "x", "positive": "y", "score": 0}, r"mine\.corpus=.*faulty\.jsonl: all 1 pairs"),
    ):
        faulty.write_text(json.dumps(rows) + "\n")
        with pytest.raises(ValueError, match=message) as e:
            mine(path, corpus=str(faulty), **every)
        assert "data." not in str(e.value)


def test_ids_of_data_and_corpus_that_clash_are_named_with_both(tmp_path, mine):
    """Mined rows have made-up ids d0, d1, ..., which a corpus may give to other texts."""
    path, corpus = tmp_path / "pairs.jsonl", tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"query": "red fish", "positive": "red fish 1"}) + "\n")
    corpus.write_text(json.dumps({"_id": "d0", "text": "blue fish"}) + "\n")
    every = {"sources": ["bm25"], "model": None, "corpus": str(corpus)}
    mine(path, **every | {"corpus": None})
    mined = (tmp_path / "mine.jsonl").rename(tmp_path / "mined.jsonl")
    with pytest.raises(ValueError, match="found 'd0' with 'blue fish' and 'red fish 1'") as e:
        mine(mined, **every)
    assert f"mine.corpus={corpus}: " in str(e.value) and f"data={mined}" in str(e.value)
    columns = {"positive_id": "", "negative_id": ""}
    assert "columns={positive_id: '', negative_id: ''}" in str(e.value)
    _, (row,) = mine(mined, columns=columns, **every)
    assert row["negative"] == ["blue fish"] and row["negative_ids"] == ["d0"]
    rows = [{"query": f"ask {t}", "positive": t, "positive_id": "d1"} for t in ("one", "two")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: expected one text an id, found 'd1'"):
        mine(path, **every)


def test_the_data_as_corpus_is_the_data_however_its_path_is_written(tmp_path, mine, monkeypatch):
    """columns= is of the data: a corpus given by its whole path would be read without it."""
    monkeypatch.chdir(tmp_path)
    path = Path("pairs.jsonl")
    rows = [{"frage": f"ask {n}", "positive": f"fish {n}"} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"sources": ["bm25"], "model": None, "columns": {"query": "frage"}}
    _, mined = mine(path, corpus=str(path.absolute()), **options)
    assert [row["query"] for row in mined] == ["ask 0", "ask 1", "ask 2"]


def test_a_run_file_is_a_source(beir, mine, tmp_path, caplog):
    """Scores and order as the file has them; ids of equal texts are one passage; a positive that
    the file does not list has at most its lowest score."""
    run = tmp_path / "run.trec"
    pool = read_pool(PrepareConfig(data=str(beir)), beir)
    answers = pool.positives[0]
    lines = [
        f"q0 Q0 d{n} 1 {50 - n} x" for n in range(50) if pool.docs.number[f"d{n}"] not in answers
    ]
    lines += ["other Q0 d1 1 3 x", "q1 Q0 d7 1 5 x"]
    run.write_text("\n".join(lines) + "\n")
    source = RunSource(pool, run)
    docs_QK, scores_QK = source.best(60)
    assert scores_QK[0, 0] == max(int(line.split()[4]) for line in lines[:-2])
    assert pool.docs.ids[docs_QK[1, 0]] in ("d7", "d31") and docs_QK[1, 1] == -1
    _, rows = mine(beir, sources=["run"], run=str(run), model=None, num_negatives=2)
    assert [r["ranks"]["run"] for r in rows[0]["mined"]] == [1, 2]
    assert "are outside the limits" not in caplog.text
    _, rows = mine(beir, sources=["run"], run=str(run), model=None, margin=0.5)
    assert rows[0]["negative"] == []  # its positive is not listed
    assert "(mine.margin=0.5). A positive that the run file does not list" in caplog.text
    run.write_text("q0 Q0 nowhere 1 2.5 x\n")
    with pytest.raises(ValueError, match=r"run\.trec:1: document 'nowhere' is not in the data"):
        mine(beir, sources=["run"], run=str(run), model=None)
    with pytest.raises(ValueError, match=r"mine\.run is not set"):
        mine(beir, sources=["run"], model=None)


# ------------------------------------------------------------------------------------------- caches


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Texts that were encoded, in order."""
    texts: list[str] = []
    original = teacher.encode

    def counted(towers, some, *args, **options):
        texts.extend(some)
        return original(towers, some, *args, **options)

    monkeypatch.setattr(teacher, "encode", counted)
    return texts


def copied(folder: Path, to: Path, change: float = 0.0) -> Path:
    """A model folder with weights moved by `change`; written over what is there."""
    from safetensors.torch import load_file, save_file

    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    rng = torch.Generator().manual_seed(0)
    weights = load_file(to / "model.safetensors")
    save_file(
        {k: w + change * torch.randn(w.shape, generator=rng) for k, w in weights.items()},
        to / "model.safetensors",
    )
    return to


def test_a_retrained_checkpoint_in_the_same_folder_is_never_served_stale(
    beir, mine, tiny_base, tmp_path, encoded
):
    """A cache keyed by the model's name answers with the embeddings of the old weights; one keyed
    by time or size does, too: the files are as large, and here as old."""
    folder = copied(tiny_base, tmp_path / "model")
    first = mine(beir, model=str(folder))
    num = len(encoded)
    assert num == 49 + 19
    assert mine(beir, model=str(folder)) == first and len(encoded) == num
    stat = (folder / "model.safetensors").stat()
    copied(tiny_base, folder, change=0.3)
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = mine(beir, model=str(folder))
    assert len(encoded) == 2 * num
    assert [r["negative"] for r in second[1]] != [r["negative"] for r in first[1]]
    assert second[1][0]["mined"][0]["model"] != first[1][0]["mined"][0]["model"]
    copied(tiny_base, folder)
    assert mine(beir, model=str(folder)) == first and len(encoded) == 2 * num


def test_changed_texts_are_encoded_again(beir, mine, encoded):
    """The same number of passages, of the same length, in the same file."""
    mine(beir)
    num = len(encoded)
    path = beir / "corpus.jsonl"
    path.write_text(path.read_text().replace("fish", "hsif"))
    mine(beir)
    assert len(encoded) == num + 49  # not the queries


@pytest.mark.parametrize("damage", ["bytes", "short", "meta", "gone"])
def test_a_damaged_cache_is_built_again(beir, mine, tmp_path, encoded, damage):
    """What a full disk or a half-copied folder leaves must cost time, not negatives."""
    first = mine(beir)
    for folder in (tmp_path / "cache").glob("model-*/"):
        path = folder / ("meta.json" if damage == "meta" else "embeddings.npy")
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-4] + (b"" if damage == "short" else b"oops"))
    num = len(encoded)
    assert mine(beir) == first
    assert len(encoded) == 2 * num


def test_what_an_interrupt_leaves_is_used(beir, mine, tmp_path, monkeypatch, encoded):
    """Ctrl-C in the third of four parts: two are kept, no half-written result stands there."""
    monkeypatch.setattr(candidates, "PART_TEXTS", 16)
    original, calls = teacher.encode, []

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == 5:  # two parts of queries, two of passages
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(teacher, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(beir)
    assert not (tmp_path / "mine.jsonl").exists() and len(encoded) == 19 + 32
    monkeypatch.setattr(teacher, "encode", original)
    resumed = mine(beir)
    assert len(encoded) == 19 + 49
    whole = mine(beir)
    assert resumed == whole


SCRIPT = """
import sys, torch
from pathlib import Path
from conf.schema import MineConfig, PrepareConfig
from data.negatives import mine_file
data, base, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
mine = MineConfig(sources=["bm25", "model"], model=base, choice="sample", num_negatives=5)
c = PrepareConfig(data=data, out=out, device="cpu", cache_dir=out + "/cache", mine=mine)
mine_file(c, Path(data), Path(out) / "mine.jsonl")
"""


@pytest.mark.slow
def test_result_does_not_follow_hash_seed_or_threads(beir, tiny_base, tmp_path):
    """Sets of strings are walked in an order of each process's own; sums of threads in another."""
    files = []
    for seed, threads in ((1, 1), (2, 2)):
        out = tmp_path / f"out{seed}"
        out.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT, str(beir), str(tiny_base), str(out), str(threads)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        files.append((out / "mine.jsonl").read_bytes())
    assert files[0] == files[1] and len(files[0]) > 1000


# ------------------------------------------------------------------------------- against the others


LOW, HIGH = 0.3, 0.6  # quantiles of all scores


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"absolute_margin": 0.01}, {"margin": 0.01}),
        ({"relative_margin": 0.02}, {"fraction": 0.98}),
        ({"max_score": HIGH, "min_score": LOW}, {"max_score": HIGH, "min_score": LOW}),
    ],
    ids=str,
)
def test_same_negatives_as_sentence_transformers(beir, mine, tiny_base, tmp_path, theirs, ours):
    """Where the settings mean the same: exact duplicates alone are left out, every rank counts.

    Random weights give scores of all sizes; two candidates of one query differ by more than float32
    rounding (asserted), so the order must be the same.
    """
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    torch.manual_seed(0)
    towers = build_model(ModelConfig(base=str(tiny_base)))
    for p in towers.parameters():
        p.data.add_(0.5 * torch.randn_like(p))
    export(towers, tmp_path / "model", {})
    pool = read_pool(PrepareConfig(data=str(beir)), beir)
    pairs = [(q, d) for q, some in enumerate(pool.positives) for d in some]
    data = Dataset.from_dict(
        {
            "query": [pool.queries.texts[q] for q, _ in pairs],
            "positive": [pool.docs.texts[d] for _, d in pairs],
        }
    )
    _, rows = mine(beir, model=str(tmp_path / "model"), last_rank=60, num_negatives=60)
    scores = [m["scores"]["model"] for r in rows for m in r["mined"]]
    theirs, ours = dict(theirs), dict(ours)
    for settings in (theirs, ours):
        for key in settings.keys() & {"max_score", "min_score"}:
            settings[key] = float(np.quantile(scores, settings[key]))
    found = mine_hard_negatives(
        data, SentenceTransformer(str(tmp_path / "model"), device="cpu"), corpus=pool.docs.texts,
        num_negatives=3, range_max=49, output_format="labeled-list", output_scores=True,
        verbose=False, **theirs,
    )  # fmt: skip
    expected = {row["query"]: row["positive"][1:] for row in found}
    _, rows = mine(beir, model=str(tmp_path / "model"), last_rank=60, **ours)
    spread = [np.diff([m["scores"]["model"] for m in r["mined"]]) for r in rows if r["negative"]]
    assert max(s.max() for s in spread if len(s)) < -1e-6
    assert {r["query"]: r["negative"] for r in rows if r["negative"]} == expected


def test_provenance_of_the_datas_own_names_no_source():
    """source is the best rank's; of equal ranks the first named."""
    assert Negative(0).source == "data"
    assert Negative(0, {"bm25": 2, "model": 2}).source == "bm25"
    assert Negative(0, {"bm25": 3, "model": 2}).source == "model"


def test_own_negatives_keep_their_provenance_through_stages(tmp_path, mine):
    """What an earlier stage mined is "data" to the next one, and no more than that without a note;
    a column of that name with other content is nobody's provenance."""
    noted = {"source": "bm25", "ranks": {"bm25": 4}}
    rows = [
        {"query": "ask 0", "positive": "answer 0", "negative": ["answer 1"], "mined": [noted]},
        {"query": "ask 1", "positive": "answer 1", "negative": ["answer 2"], "mined": True},
        {"query": "ask 2", "positive": "answer 2", "negative": ["answer 0"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, mined = mine(path, num_negatives=1)
    assert [row["mined"][0] for row in mined] == [noted, {"source": "data"}, {"source": "data"}]
    assert report["counts"]["own negatives"] == 3
    examples = read_examples(SourceConfig(root=str(tmp_path / "mine.jsonl")), None)
    for e, row in zip(examples, mined, strict=True):
        triplets = triplets_of(e, 2)
        assert [t.mined for t in triplets] == [[entry] for entry in row["mined"]]
        assert [row_of(t)["mined"] for t in triplets] == [t.mined for t in triplets]
