"""Scores of pairs, candidates in order, reranked hits; metrics against two other libraries."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import pytrec_eval
import torch

from data.pairs import PairTemplate, pack_pairs, tokenise_plain
from data.records import RerankSet
from evals import rerank
from evals.bm25 import bm25_hits
from evals.metrics import RERANK_NAMES, evaluate_hits, names_up_to
from evals.rerank import (
    bm25_scores,
    candidate_hits,
    evaluate_candidates,
    latency_ms,
    random_scores,
    rerank_hits,
    retriever_scores,
    score_pairs,
)
from evals.run_file import read_run, run_lines
from evals.search import Hits, search
from models.pretrained import load_towers
from models.reranker import load_reranker

QUERIES = ["red fish", "a", "blue whale and fox", "red fish", "who?"]
PASSAGES = ["a red fish swims", "b", "stone", "the fox is no whale " * 8, "stone", "pear tree"]


@pytest.fixture(scope="module")
def reranker(tiny_base):
    torch.manual_seed(3)
    model = load_reranker(tiny_base)
    with torch.no_grad():  # fresh weights of std .02 hardly tell pairs apart
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


def sample(num_queries: int = 40, num_docs: int = 60, *, top_grade: int = 3, seed: int = 0):
    """Groups of 1 to 30 candidates, some without an answer among them, and scores with ties."""
    rng = np.random.default_rng(seed)
    doc_ids = [f"d{i}" for i in range(num_docs)]
    query_ids = [f"q{i}" for i in range(num_queries)]
    candidates, qrels, scores = {}, {}, {}
    for i, q in enumerate(query_ids):
        chosen = rng.choice(num_docs, int(rng.integers(1, min(31, num_docs))), replace=False)
        candidates[q] = [doc_ids[d] for d in chosen]
        grades = rng.integers(0, top_grade + 1, len(chosen)) * (rng.random(len(chosen)) < 0.4)
        qrels[q] = {d: int(g) for d, g in zip(candidates[q], grades, strict=True)}
        if i % 7 == 0:
            qrels[q] |= {"elsewhere": 1}
        scores[q] = rng.integers(-4, 5, len(chosen)).astype(np.float32) / 4
    data = RerankSet("s", doc_ids, doc_ids, query_ids, query_ids, qrels, candidates=candidates)
    return data, scores


# -------------------------------------------------------------------------------- scores of pairs


def test_a_score_is_that_of_the_pair_alone(reranker):
    """Packing, sorting by length and scattering back must not hand a score to another pair."""
    pairs = [(q, p) for q in range(len(QUERIES)) for p in range(len(PASSAGES))]
    found_P = score_pairs(reranker, QUERIES, PASSAGES, pairs, batch_tokens=70, precision="fp32")
    template = PairTemplate.of(reranker.tokenizer)
    reranker.eval()
    for (q, p), score in zip(pairs, found_P, strict=True):
        q_ids, p_ids = tokenise_plain(reranker.tokenizer, [QUERIES[q], PASSAGES[p]])
        pair = template.join(q_ids, p_ids, reranker.spec.max_length)
        with torch.no_grad():
            alone = reranker.score(reranker(pack_pairs([pair]))).item()
        assert score == pytest.approx(alone, abs=1e-5)  # fp32: sums in another order
    assert found_P.std() > 0.01 and found_P.dtype == np.float32


def test_the_same_pairs_have_the_same_bits_in_any_order(reranker):
    """A chunk's shape moves the last bits: an order that followed the asking would move ties."""
    rng = np.random.default_rng(0)
    pairs = np.array([(q, p) for q in range(5) for p in range(6)])
    found = score_pairs(reranker, QUERIES, PASSAGES, pairs, batch_tokens=80)
    by_texts = {}
    for (q, p), score in zip(pairs, found, strict=True):
        assert by_texts.setdefault((QUERIES[q], PASSAGES[p]), score) == score  # copies tie
    for _ in range(3):
        of_q, of_p = rng.permutation(5), rng.permutation(6)
        shuffled = rng.permutation(np.concatenate([pairs, pairs[:7]]))
        again = score_pairs(
            reranker, [QUERIES[i] for i in of_q], [PASSAGES[i] for i in of_p], shuffled,
            batch_tokens=80,
        )  # fmt: skip
        for (q, p), score in zip(shuffled, again, strict=True):
            assert score == by_texts[QUERIES[of_q[q]], PASSAGES[of_p[p]]]


def test_each_text_is_tokenised_once_and_each_pair_scored_once(reranker, monkeypatch):
    """100 candidates a query: tokenising the query 100 times is what everyone else does."""
    seen, scored = [], []
    monkeypatch.setattr(
        rerank,
        "tokenise_plain",
        lambda t, texts, *a: seen.extend(texts) or tokenise_plain(t, texts, *a),
    )
    monkeypatch.setattr(
        rerank,
        "pack_pairs",
        lambda pairs, device: scored.extend(pairs) or pack_pairs(pairs, device),
    )
    pairs = [(q, p) for q in range(5) for p in range(5)] * 2
    score_pairs(reranker, QUERIES, PASSAGES, pairs)
    assert sorted(seen) == sorted({*QUERIES, *PASSAGES[:5]})
    assert len(scored) == 4 * 4


def test_prompts_are_the_models_own_unless_given(reranker, monkeypatch):
    plain = score_pairs(reranker, ["ask: red"], ["say: fish"], [(0, 0)])
    given = score_pairs(reranker, ["red"], ["fish"], [(0, 0)], prompts=("ask: ", "say: "))
    monkeypatch.setattr(reranker.spec, "query_prompt", "ask: ")
    monkeypatch.setattr(reranker.spec, "passage_prompt", "say: ")
    own = score_pairs(reranker, ["red"], ["fish"], [(0, 0)])
    assert plain == given == own
    assert score_pairs(reranker, ["red"], ["fish"], [(0, 0)], prompts=("", "")) != own


def test_a_model_in_training_is_scored_without_dropout_and_stays_in_training(reranker):
    reranker.train()
    found = [score_pairs(reranker, QUERIES, PASSAGES, [(0, 0), (2, 3)]) for _ in range(2)]
    assert reranker.training and (found[0] == found[1]).all()
    assert len(score_pairs(reranker, [], [], [])) == 0


def test_a_score_that_is_not_finite_names_the_query(reranker, tiny_base):
    broken = load_reranker(tiny_base)
    with torch.no_grad():
        broken.head.out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"score of query 'red fish' is nan"):
        score_pairs(broken, QUERIES, PASSAGES, [(0, 0)])


# -------------------------------------------------------------------------------- grouped metrics


def test_grouped_metrics_equal_pytrec_eval_on_the_written_file(tmp_path):
    """Grades, ties and groups of other sizes; MRR and MAP over whole lists, 30 long."""
    data, scores = sample(200)
    scored = evaluate_candidates(data, scores)
    path = tmp_path / "run.trec"
    path.write_text("".join(run_lines(scored.hits, "t")), encoding="utf-8")
    with open(path, encoding="utf-8") as f:
        run = pytrec_eval.parse_run(f)
    assert {q: len(of) for q, of in run.items()} == {q: len(c) for q, c in data.candidates.items()}
    names = {"mrr": "recip_rank", "map": "map", "ndcg@10": "ndcg_cut_10"}
    theirs = pytrec_eval.RelevanceEvaluator(data.qrels, set(names.values())).evaluate(run)
    for at, query_id in enumerate(scored.metrics.query_ids):
        for ours, measure in names.items():
            value = scored.metrics.per_query[ours][at]
            assert abs(value - theirs[query_id][measure]) <= 1e-9, (ours, query_id)
    whole = scored.metrics.per_query["mrr"]
    assert ((whole > 0) & (whole < 0.1)).any()  # an answer past rank 10 counts


def test_grouped_metrics_equal_sentence_transformers():
    """Its CrossEncoderRerankingEvaluator on binary grades without ties, where all is at hand."""
    evaluation = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    data, _ = sample(top_grade=1, seed=4)
    data.qrels = {
        q: {d: g for d, g in of.items() if d in data.doc_ids} for q, of in data.qrels.items()
    }
    for q, ids in data.candidates.items():
        data.qrels[q][ids[0]] = 1  # with none it counts 0 by itself, without asking the model
        data.qrels[q] |= dict.fromkeys(ids[1:2], 0)
    rng = np.random.default_rng(5)
    value = {(q, d): rng.standard_normal() for q, ids in data.candidates.items() for d in ids}
    graded = {q: [(d, data.qrels[q].get(d, 0)) for d in ids] for q, ids in data.candidates.items()}
    samples = [
        {
            "query": q,
            "positive": [d for d, grade in of if grade],
            "negative": [d for d, grade in of if not grade],
        }
        for q, of in graded.items()
    ]

    class Given:
        """The scores above for any pair."""

        model_card_data = None

        def predict(self, pairs, **options):
            return np.array([value[tuple(pair)] for pair in pairs])

    samples = [s for s in samples if s["negative"]]  # scikit-learn refuses a list of one
    asked = {s["query"] for s in samples}
    evaluator = evaluation.CrossEncoderRerankingEvaluator(samples, write_csv=False)
    evaluator.store_metrics_in_model_card_data = lambda *a, **k: None
    theirs = evaluator(Given())
    scores = {
        q: np.array([value[q, d] for d in ids], np.float32) for q, ids in data.candidates.items()
    }
    found = evaluate_candidates(data, scores, (*RERANK_NAMES, "mrr@10")).metrics
    kept = [at for at, q in enumerate(found.query_ids) if q in asked]
    for name in ("map", "mrr@10", "ndcg@10"):
        ours = found.per_query[name][kept].mean()
        assert ours == pytest.approx(theirs[name], abs=1e-9), name


def test_short_groups_and_groups_without_an_answer_count():
    """A set whose longest list has 3 documents still has an nDCG@10; nothing found counts 0."""
    data = RerankSet(
        "s", ["a", "b", "c", "d"], list("abcd"), ["q1", "q2", "q3"], list("xyz"),
        {"q1": {"a": 1}, "q2": {"d": 1}, "q3": {"a": 1}},
        candidates={"q1": ["a", "b", "c"], "q2": ["a", "b"], "q3": []},
    )  # fmt: skip
    scores = {"q1": np.array([0.1, 0.9, 0.5]), "q2": np.array([1, 2]), "q3": np.zeros(0)}
    found = evaluate_candidates(data, scores).metrics
    assert found.query_ids == ["q1", "q2", "q3"]
    assert found.per_query["mrr"].tolist() == [1 / 3, 0, 0]
    assert found.per_query["ndcg@10"].tolist() == [0.5, 0, 0]


# ------------------------------------------------------------------------------------ reranked hits


def test_only_the_first_k_change_places_and_the_file_says_so(reranker, tmp_path):
    """trec_eval sorts by score: the documents that were not scored must stay below, in order."""
    data, _ = sample()
    data.doc_texts = [f"{WORD[i % 7]} {WORD[i % 5]} {i % 11}" for i in range(60)]
    rng = np.random.default_rng(1)
    p_ND, q_QD = rng.standard_normal((60, 6)), rng.standard_normal((40, 6))
    before = search(p_ND=p_ND, q_QD=q_QD, doc_ids=data.doc_ids, query_ids=data.query_ids, k=25)
    after, scores = rerank_hits(reranker, data, before, 8)
    for row in range(40):
        old, new = before.docs_QK[row].tolist(), after.docs_QK[row].tolist()
        assert new[8:] == old[8:] and set(new[:8]) == set(old[:8])
        value = dict(zip(old[:8], scores[f"q{row}"], strict=True))
        assert new[:8] == sorted(old[:8], key=lambda d: (value[d], data.doc_ids[d]), reverse=True)
        assert (np.diff(after.scores_QK[row, 7:]) < 0).all()
    assert any((after.docs_QK[r] != before.docs_QK[r]).any() for r in range(40))
    path = tmp_path / "run.trec"
    path.write_text("".join(run_lines(after, "t")), encoding="utf-8")
    read = read_run(path, data, 25)
    assert (read.docs_QK == after.docs_QK).all() and (read.scores_QK == after.scores_QK).all()
    names = names_up_to(25)
    assert (
        evaluate_hits(read, data.qrels, names).means
        == evaluate_hits(after, data.qrels, names).means
    )


WORD = "red blue fish stone fox pear whale".split()


def test_k_beyond_the_hits_and_no_hits_at_all(reranker):
    data, _ = sample(3, 4)
    docs_QK = np.array([[2, 0, -1, -1, -1], [-1] * 5, [1, 2, 3, 0, -1]])
    hits = Hits(data.query_ids, data.doc_ids, np.where(docs_QK < 0, -np.inf, 1.0), docs_QK)
    after, _ = rerank_hits(reranker, data, hits, 100)
    assert (after.docs_QK[1] == -1).all() and np.isneginf(after.scores_QK[1]).all()
    assert sorted(after.docs_QK[0, :2].tolist()) == [0, 2] and (after.docs_QK[0, 2:] == -1).all()


# ---------------------------------------------------------------------------------- other systems


def test_retriever_scores_are_those_of_the_search(tiny_base):
    """The same embeddings, another arrangement of the arithmetic."""
    towers = load_towers(tiny_base)
    data, _ = sample(8, 30)
    data.doc_texts = [f"{WORD[i % 7]} {WORD[i % 5]} {i % 3}" for i in range(30)]
    found = retriever_scores(towers, data, data.candidates)
    from evals.retrieval import encode_sets

    q_QD, p_ND = encode_sets(towers, {"s": data})["s"]
    for row, (query_id, ids) in enumerate(data.candidates.items()):
        want = [p_ND[data.doc_ids.index(d)] @ q_QD[row] for d in ids]
        assert found[query_id] == pytest.approx(want, abs=1e-6)
    cut = retriever_scores(towers, data, data.candidates, dim=4)
    hits = search(q_QD, p_ND, data.doc_ids, data.query_ids, k=30, dim=4)
    of = {q: dict(hits.of(row)) for row, q in enumerate(data.query_ids)}
    for query_id, ids in data.candidates.items():
        assert cut[query_id] == pytest.approx([of[query_id][d] for d in ids], abs=1e-6)


def test_bm25_scores_are_those_of_the_search():
    data, _ = sample(6, 40)
    data.doc_texts = [f"{WORD[i % 7]} {WORD[i % 5]} x{i}" for i in range(40)]
    data.query_texts = [f"{WORD[i]} {WORD[i + 1]}" for i in range(6)]
    found, hits = bm25_scores(data, data.candidates), bm25_hits(data, 40)
    for row, query_id in enumerate(data.query_ids):
        of = dict(hits.of(row))
        want = [of.get(d, 0.0) for d in data.candidates[query_id]]
        assert found[query_id] == pytest.approx(want, abs=1e-5)


def test_a_random_order_follows_seed_and_ids_alone():
    """Candidates come in another order from another reader; the row must not change with it."""
    data, _ = sample()
    turned = {q: ids[::-1] for q, ids in reversed(data.candidates.items())}
    one, other = random_scores(data.candidates, 1), random_scores(turned, 1)
    assert all((one[q] == other[q][::-1]).all() for q in one)
    assert any((one[q] != random_scores(data.candidates, 2)[q]).any() for q in one)
    ten = {f"q{i}": [f"d{j}" for j in range(10)] for i in range(3000)}
    docs = [f"d{j}" for j in range(10)]
    many = RerankSet("s", docs, docs, list(ten), list(ten), {q: {"d3": 1} for q in ten}, ten)
    found = evaluate_candidates(many, random_scores(ten)).metrics.means["mrr"]
    # one answer among ten: mean of 1/rank is H(10) / 10 = .293, its standard error here .005
    assert found == pytest.approx(sum(1 / r for r in range(1, 11)) / 10, abs=0.02)


def test_latency_is_of_single_queries(reranker, monkeypatch):
    """A batch of all queries divided by their number says nothing about one user's wait."""
    data, _ = sample(12)
    asked, scored = [], rerank.score_pairs

    def score_pairs(model, queries, passages, pairs, **options):
        asked.append(pairs)
        return scored(model, queries, passages, pairs, **options)

    monkeypatch.setattr(rerank, "score_pairs", score_pairs)
    found = latency_ms(reranker, data, data.candidates, count=5)
    assert found["queries"] == 5 and len(asked) == 7
    of = [{data.query_ids[q]: [data.doc_ids[n] for n in pairs[:, 1]]} for pairs in asked for q in
          {int(q) for q in pairs[:, 0]}]  # fmt: skip
    assert len(of) == 7 and all(one.items() <= data.candidates.items() for one in of)
    assert 0 < found["median_ms"] <= found["p90_ms"]
    assert latency_ms(reranker, data, {"q1": []}, count=5)["queries"] == 0
    single = latency_ms(reranker, data, {"q1": data.candidates["q1"]}, count=5)
    assert single["queries"] == 1


# ---------------------------------------------------------------------------------------- run files


def test_a_run_file_is_read_in_the_total_order(tmp_path, caplog):
    """Lines in any order, ranks that lie, ties; queries of another split are left out and said."""
    data, _ = sample(3, 5)
    path = tmp_path / "some.run"
    path.write_text(
        "q1 Q0 d0 1 0.5 x\nq1 Q0 d3 9 0.5 x\n\nq1\tQ0\td4\t2\t0.7\tx\n"
        "q9 Q0 d1 1 3 x\nq0 Q0 d1 1 -2 x\n"
    )
    with caplog.at_level(logging.WARNING):
        hits = read_run(path, data, 2)
    assert hits.ids_by_query() == {"q0": ["d1"], "q1": ["d4", "d3"], "q2": []}
    assert "1 of its queries are not in the data; 1 queries of the data have no line" in caplog.text


def test_a_run_file_s_own_query_is_no_hit(tmp_path):
    """As in every other search of a BEIR folder, where one id is one text on both sides."""
    data, _ = sample(3, 5)
    data.doc_ids[3] = "q1"
    path = tmp_path / "some.run"
    path.write_text("q1 Q0 q1 1 9 x\nq1 Q0 d0 2 1 x\nq0 Q0 q1 1 5 x\nq2 Q0 d4 1 1 x\n")
    assert read_run(path, data, 2).ids_by_query()["q1"] == ["q1", "d0"]
    data = replace(data, shares_ids=True)
    assert read_run(path, data, 2).ids_by_query() == {"q0": ["q1"], "q1": ["d0"], "q2": ["d4"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 d3 0.5", r"some\.run:2: expected a line of a TREC run file.* found 3 fields"),
        ("q1 Q0 d3 1 high x", r"some\.run:2: expected a finite score in field 5, found 'high'"),
        ("q1 Q0 d3 1 nan x", r"some\.run:2: expected a finite score"),
        ("q1 Q0 zz 1 1 x", r"some\.run:2: document 'zz' is not in the data"),
        ("q0 Q0 d1 2 1 x", r"some\.run:2: query 'q0' has document 'd1' twice"),
    ],
)
def test_a_bad_line_of_a_run_file_is_named(tmp_path, line, message):
    data, _ = sample(3, 5)
    path = tmp_path / "some.run"
    path.write_text(f"q0 Q0 d1 1 0.5 x\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_run(path, data, 10)


def test_a_run_file_of_another_split_is_refused(tmp_path):
    data, _ = sample(3, 5)
    (tmp_path / "some.run").write_text("z1 Q0 d1 1 0.5 x\n")
    with pytest.raises(ValueError, match=r"none of its queries \(z1\) is asked"):
        read_run(tmp_path / "some.run", data, 10)
    (tmp_path / "some.run").write_bytes(b"q1 Q0 d1 1 \xff x\n")
    with pytest.raises(ValueError, match="UTF-8"):
        read_run(tmp_path / "some.run", data, 10)
    with pytest.raises(ValueError, match="cannot be read"):
        read_run(tmp_path / "no.run", data, 10)


def test_candidates_keep_the_total_order_of_ties():
    """Tied scores: the greater id first, whatever order the data lists candidates in."""
    data = RerankSet(
        "s", ["d10", "d9", "e"], ["", "", ""], ["q"], ["?"], {"q": {"d9": 1}},
        candidates={"q": ["d10", "e", "d9"]},
    )  # fmt: skip
    assert candidate_hits(data, {"q": np.zeros(3)}).ids_by_query() == {"q": ["e", "d9", "d10"]}
