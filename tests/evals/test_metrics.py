"""Metrics against pytrec_eval on the written run file and sentence-transformers' own evaluator."""

import math
import time

import numpy as np
import pytest
import pytrec_eval

from evals.metrics import NAMES, evaluate_hits, measure_of, names_up_to
from evals.run_file import run_lines
from evals.search import Hits, search

TREC = {
    "accuracy": "success_{}",
    "precision": "P_{}",
    "recall": "recall_{}",
    "ndcg": "ndcg_cut_{}",
    "map": "map_cut_{}",
}


def tied_and_graded() -> tuple[Hits, dict[str, dict[str, int]]]:
    """60 queries with tied scores, grades 0 to 3, too few relevant, none relevant, none found."""
    rng = np.random.default_rng(0)
    p_ND = rng.integers(-1, 2, (150, 4)).astype(np.float32)  # 81 vectors for 150 documents
    q_QD = rng.integers(-1, 2, (60, 4)).astype(np.float32)
    doc_ids = [f"d{i}" for i in range(150)]
    hits = search(q_QD, p_ND, doc_ids, [f"q{i}" for i in range(60)], k=100)
    qrels = {}
    for i in range(55):  # q55 to q59 are not judged
        judged = rng.choice(150, size=int(rng.integers(1, 40)), replace=False)
        grades = rng.integers(0, 4, len(judged)) if i else np.zeros(len(judged), dtype=int)
        qrels[f"q{i}"] = {doc_ids[d]: int(g) for d, g in zip(judged, grades, strict=True)}
    qrels["q1"] = {"not in the corpus": 1}
    return hits, qrels


def test_metrics_equal_pytrec_eval_on_the_written_file(tmp_path):
    """Ties in the file, grades, queries without a relevant document: trec_eval sorts for itself."""
    hits, qrels = tied_and_graded()
    (tmp_path / "run.trec").write_text("".join(run_lines(hits, "t")), encoding="utf-8")
    with open(tmp_path / "run.trec", encoding="utf-8") as f:
        run = pytrec_eval.parse_run(f)
    # shuffled: nothing may lean on the order of lines
    run = {q: dict(sorted(of.items(), key=lambda x: x[0][::-1])) for q, of in run.items()}
    names = [n for n in NAMES if not n.startswith("mrr")]
    wanted = {TREC[n.partition("@")[0]].format(n.partition("@")[2]) for n in names}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted | {"recip_rank"}).evaluate(run)
    ours = evaluate_hits(hits, qrels)
    assert ours.query_ids == [f"q{i}" for i in range(55)] and ours.num_unjudged == 5
    for at, query_id in enumerate(ours.query_ids):
        for name in names:
            measure = TREC[name.partition("@")[0]].format(name.partition("@")[2])
            assert abs(ours.per_query[name][at] - theirs[query_id][measure]) <= 1e-9, (
                name,
                query_id,
            )
        rr = theirs[query_id]["recip_rank"]
        assert ours.per_query["mrr@10"][at] == (rr if rr > 1 / 10.5 else 0)
    for name in names:
        measure = TREC[name.partition("@")[0]].format(name.partition("@")[2])
        mean = sum(t[measure] for t in theirs.values()) / len(theirs)
        assert abs(ours.means[name] - mean) <= 1e-9
    assert ours.per_query["ndcg@10"][0] == 0 and ours.per_query["recall@100"][1] == 0


def test_metrics_equal_sentence_transformers_on_the_same_embeddings():
    """Without ties and with at most k relevant documents the two definitions agree."""
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    import torch

    rng = np.random.default_rng(1)
    p_ND = rng.standard_normal((400, 24)).astype(np.float32)
    q_QD = rng.standard_normal((80, 24)).astype(np.float32)
    p_ND /= np.linalg.norm(p_ND, axis=1, keepdims=True)
    q_QD /= np.linalg.norm(q_QD, axis=1, keepdims=True)
    doc_ids, query_ids = [f"d{i}" for i in range(400)], [f"q{i}" for i in range(80)]
    qrels = {
        q: {doc_ids[d]: 1 for d in rng.integers(0, 400, 1 + i % 9)} for i, q in enumerate(query_ids)
    }

    class Given(evaluation.InformationRetrievalEvaluator):
        """The embeddings above for any text."""

        def embed_inputs(self, model, sentences, encode_fn_name=None, **kwargs):
            rows = [int(s[1:]) for s in sentences]
            return torch.from_numpy((q_QD if sentences[0][0] == "q" else p_ND)[rows])

    evaluator = Given(
        {q: q for q in query_ids}, {d: d for d in doc_ids}, {q: set(of) for q, of in qrels.items()},
        accuracy_at_k=[1, 3, 5, 10], precision_recall_at_k=[1, 5, 10, 100],
        score_functions={"dot": lambda a, b: a @ b.T}, show_progress_bar=False,
    )  # fmt: skip
    theirs = evaluator.compute_all_metrics(None)["dot"]
    ours = evaluate_hits(search(q_QD, p_ND, doc_ids, query_ids, k=100), qrels).means
    for name, value in ours.items():
        family, _, cutoff = name.partition("@")
        assert abs(value - theirs[f"{family}@k"][int(cutoff)]) <= 1e-4, name


def hits_of(rows: dict[str, list[str]]) -> Hits:
    """Hits in the given order, all with the same score."""
    doc_ids = sorted({d for of in rows.values() for d in of})
    most = max(map(len, rows.values()))
    docs_QK = np.full((len(rows), most), -1, dtype=np.int64)
    for i, of in enumerate(rows.values()):
        docs_QK[i, : len(of)] = [doc_ids.index(d) for d in of]
    scores_QK = np.where(docs_QK >= 0, 0.5, -np.inf).astype(np.float32)
    return Hits(list(rows), doc_ids, scores_QK, docs_QK)


def test_values_by_hand():
    """One query, answers of grade 2 at rank 2 and grade 1 at rank 4; one more was never found."""
    hits = hits_of({"q": [f"d{i}" for i in range(12)]})
    m = evaluate_hits(hits, {"q": {"d1": 2, "d3": 1, "missing": 1, "d0": 0}}).means
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert m["ndcg@10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal, abs=1e-12)
    assert m["map@100"] == pytest.approx((1 / 2 + 2 / 4) / 3, abs=1e-12)
    assert (m["mrr@10"], m["accuracy@1"], m["accuracy@3"]) == (0.5, 0, 1)
    assert (m["precision@5"], m["recall@5"]) == pytest.approx((2 / 5, 2 / 3))


@pytest.mark.parametrize(("rank", "value"), [(1, 1.0), (10, 0.1), (11, 0.0)])
def test_mrr_is_cut_at_ten_and_follows_our_order_of_ties(rank, value):
    """ir-measures hands RR@10 to a provider that breaks ties the other way; here all are tied."""
    for ids in ([f"d{i:02d}" for i in range(20)], [f"d{i:02d}" for i in range(19, -1, -1)]):
        found = evaluate_hits(hits_of({"q": ids}), {"q": {ids[rank - 1]: 1}}, ["mrr@10"])
        assert found.means["mrr@10"] == value


def test_whole_list_metrics_stand_beside_those_with_a_cut():
    """mrr and mrr@10 are one measure to the library: one must not take the other's place."""
    hits = hits_of({"q": [f"d{i:02d}" for i in range(20)]})
    names = ["mrr@10", "mrr", "map@10", "map", "ndcg@10"]
    for rank in (4, 15):
        found = evaluate_hits(hits, {"q": {f"d{rank - 1:02d}": 1}}, names).means
        cut = 1 / rank if rank <= 10 else 0.0
        assert (found["mrr"], found["map"]) == pytest.approx((1 / rank, 1 / rank))
        assert (found["mrr@10"], found["map@10"]) == pytest.approx((cut, cut))
    for bad in ("ndcg", "recall", "mrr@", "mrr@x"):
        with pytest.raises(ValueError, match="no metric named"):
            measure_of(bad)


def test_queries_without_hits_count_as_zero_and_unjudged_do_not_count():
    """pytrec_eval leaves out a query that is not in the run; its mean would flatter."""
    hits = hits_of({"found": ["d1", "d2"], "nothing": [], "unjudged": ["d1"], "empty": ["d1"]})
    m = evaluate_hits(
        hits, {"found": {"d1": 1}, "nothing": {"d2": 1}, "empty": {}, "other": {"d1": 1}}
    )
    assert m.query_ids == ["found", "nothing"] and m.num_unjudged == 2
    assert m.means["accuracy@1"] == 0.5
    nobody = evaluate_hits(hits, {})
    assert nobody.means["ndcg@10"] == 0.0 and nobody.num_unjudged == 4


def test_cutoffs_beyond_the_search_are_refused():
    """map@100 of 10 hits is a number, and wrong."""
    hits, qrels = tied_and_graded()
    short = Hits(hits.query_ids, hits.doc_ids, hits.scores_QK[:, :10], hits.docs_QK[:, :10])
    with pytest.raises(ValueError, match=r"recall@100 needs 100 hits a query, the search kept 10"):
        evaluate_hits(short, qrels)
    kept = evaluate_hits(short, qrels, names_up_to(10)).means
    assert set(kept) == {n for n in NAMES if int(n.split("@")[1]) <= 10}
    full = evaluate_hits(hits, qrels).means
    assert all(kept[name] == full[name] for name in kept)
    with pytest.raises(ValueError, match="no metric named 'hit@k'"):
        measure_of("hit@k")


def test_run_file_gives_every_float32_back():
    """Fewer digits than nine merge neighbours, and trec_eval would then reorder them by id."""
    value = np.float32(0.7)
    scores = [value]
    for _ in range(99):
        scores.append(np.nextafter(scores[-1], np.float32(-1)))
    doc_ids = [f"d{i:02d}" for i in range(100)]
    hits = Hits(["q"], doc_ids, np.array([scores]), np.arange(100)[None])
    lines = [line.split() for line in run_lines(hits, "tag")]
    assert [np.float32(line[4]) for line in lines] == scores
    assert lines[0][:4] == ["q", "Q0", "d00", "1"] and lines[0][5] == "tag"


@pytest.mark.parametrize("bad", ["a b", "a\tb", "", "a\u00a0b"])
def test_run_file_refuses_ids_that_it_cannot_hold(bad):
    hits = Hits(["q"], [bad], np.ones((1, 1), np.float32), np.zeros((1, 1), np.int64))
    with pytest.raises(ValueError, match=r"document id .* white space"):
        list(run_lines(hits, "t"))


def test_a_thousand_queries_at_four_dims_take_under_three_seconds():
    """A quick evaluation during training must not wait for the metrics (processor time)."""
    rng = np.random.default_rng(2)
    docs_QK = np.argsort(rng.random((1000, 2000)), axis=1)[:, :100]
    scores_QK = -np.sort(-rng.random((1000, 100)).astype(np.float32), axis=1)
    hits = Hits([f"q{i}" for i in range(1000)], [f"d{i}" for i in range(2000)], scores_QK, docs_QK)
    qrels = {f"q{i}": {f"d{d}": 1 for d in rng.integers(0, 2000, 3)} for i in range(1000)}
    evaluate_hits(hits, qrels)  # the library's import
    start = time.process_time()
    for _ in range(4):
        evaluate_hits(hits, qrels)
    assert time.process_time() - start < 3
