"""evaluate.py where candidates are put in order: a first stage reranked, models side by side."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch

import evaluate
from conf.cli import UsageError, prepare_overrides
from conf.schema import EvaluateConfig
from models.export_reranker import export_reranker
from models.reranker import load_reranker

ROOT = Path(__file__).parents[1]
WORDS = "red green blue fish whale fox apple pear stone river mountain cloud".split()


@pytest.fixture(scope="module")
def beir(tmp_path_factory) -> Path:
    """90 documents of three words, 24 queries of two, graded answers."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    docs = [
        {"_id": f"d{i}", "title": "", "text": " ".join(rng.choice(WORDS, 3))} for i in range(90)
    ]
    queries = [{"_id": f"q{i}", "text": " ".join(rng.choice(WORDS, 2))} for i in range(24)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    rows = [
        f"q{i}\td{d}\t{grade}"
        for i in range(24)
        for d, grade in zip(rng.choice(90, 3, replace=False), (2, 1, 1), strict=True)
    ]
    lines = "\n".join(["query-id\tcorpus-id\tscore", *rows])
    (folder / "qrels/test.tsv").write_text(lines + "\n")
    return folder


@pytest.fixture(scope="module")
def labelled(beir, tmp_path_factory) -> Path:
    """Rows of ids: eight candidates a query, one or two of which are relevant."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("labelled")
    rows = []
    for i in range(24):
        for at, d in enumerate(rng.choice(90, 8, replace=False)):
            rows.append({"query_id": f"q{i}", "doc_id": f"d{d}", "label": int(at <= i % 2)})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def reranker(tiny_base, tmp_path_factory) -> Path:
    """An export of random weights that tell pairs apart."""
    torch.manual_seed(1)
    model = load_reranker(tiny_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("models") / "cross"
    export_reranker(model, folder, {})
    return folder


def config(model, data, **rest) -> EvaluateConfig:
    rest = {"device": "cpu", "latency_queries": 2} | rest
    return EvaluateConfig(model=str(model), data=str(data), **rest)


def run_of(path: Path) -> dict:
    with open(path, encoding="utf-8") as f:
        return pytrec_eval.parse_run(f)


def judged(beir: Path) -> dict:
    qrels: dict = {}
    for line in (beir / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, doc, grade = line.split("\t")
        qrels.setdefault(query, {})[doc] = int(grade)
    return qrels


def labels_in(path: Path) -> dict:
    qrels: dict = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        qrels.setdefault(row["query_id"], {})[row["doc_id"]] = row["label"]
    return qrels


def test_a_first_stage_is_reranked_before_and_after_in_one_table(beir, reranker, tmp_path, capsys):
    """Numbers of both rows against trec_eval on the run files; only the first k may move."""
    out = tmp_path / "out"
    result = evaluate.run(config(reranker, beir, first_stage="bm25", rerank_k=12, out=str(out)))
    assert list(result["metrics"]) == ["bm25", "cross"] and result["reference"] == "bm25"
    assert json.loads((out / "eval.json").read_text()) == result
    before, after = run_of(out / "run_bm25.trec"), run_of(out / "run.trec")
    qrels = judged(beir)
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "map_cut_100"})
    for label, run in (("bm25", before), ("cross", after)):
        found = evaluator.evaluate(run)
        for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("map@100", "map_cut_100")):
            mean = sum(found.get(q, {theirs: 0})[theirs] for q in qrels) / len(qrels)
            assert result["metrics"][label][ours] == pytest.approx(mean, abs=1e-9)
    ranked = {
        name: {q: sorted(of, key=lambda d: (of[d], d), reverse=True) for q, of in run.items()}
        for name, run in (("before", before), ("after", after))
    }
    for q, ids in ranked["before"].items():
        assert ranked["after"][q][12:] == ids[12:]
        assert set(ranked["after"][q][:12]) == set(ids[:12])
    diff = result["metrics"]["cross"]["ndcg@10"] - result["metrics"]["bm25"]["ndcg@10"]
    assert result["delta"]["cross"]["ndcg@10"]["diff"] == pytest.approx(diff, abs=1e-12)
    taken = result["time"]["cross"]
    assert taken["queries"] == 2 and 0 < taken["median_ms"] <= taken["p90_ms"]
    printed = capsys.readouterr().out
    for text in ("by bm25, the first 12 reranked", "BM25", "cross nDCG@10", "ms a query (median"):
        assert text in printed
    assert printed.count("[95% interval]") == 4  # MRR, nDCG, MAP; the differences


def test_a_run_file_as_first_stage_gives_what_its_model_gave(beir, reranker, tiny_base, tmp_path):
    """The way to rerank what any other engine has found."""
    out = tmp_path / "out"
    evaluate.run(config(tiny_base, beir, bm25=False, out=str(out), top_k=30))
    by_model = evaluate.run(
        config(
            reranker, beir, first_stage=str(tiny_base), top_k=30, rerank_k=9,
            out=str(tmp_path / "by_model"),
        )
    )  # fmt: skip
    by_file = evaluate.run(
        config(reranker, beir, first_stage=str(out / "run.trec"), top_k=30, rerank_k=9)
    )
    assert by_model["metrics"]["cross"] == by_file["metrics"]["cross"]
    assert list(by_file["metrics"]) == ["run.trec", "cross"]
    third = evaluate.run(
        config(tiny_base, beir, first_stage="bm25", top_k=30, also=[str(tmp_path / "by_model")])
    )  # the reranked row of that file, not its first stage's
    assert third["metrics"]["by_model"] == pytest.approx(by_model["metrics"]["cross"], abs=1e-12)
    alone = evaluate.run(config(out / "run.trec", beir, bm25=False, top_k=30))
    assert alone["metrics"]["run"] == by_file["metrics"]["run.trec"]


def test_models_stand_side_by_side_on_the_datas_candidates(
    beir, labelled, reranker, tiny_base, tmp_path, capsys
):
    """One call, one set of candidates, p against the first: the reference table's form."""
    also = ["bm25", "random", str(tiny_base)]
    out = tmp_path / "out"
    result = evaluate.run(config(reranker, labelled, texts=str(beir), also=also, out=str(out)))
    labels = ["cross", "bm25", "random", tiny_base.name]
    assert list(result["metrics"]) == labels and result["reference"] == "cross"
    assert result["candidates"] == {"mean": 8.0, "most": 8, "with_answer": 1.0}
    for label in labels:
        assert list(result["metrics"][label]) == ["mrr", "map", "ndcg@10"]
        low, high = result["ci95"][label]["mrr"]
        assert low <= result["metrics"][label]["mrr"] <= high
    qrels = labels_in(labelled / "test.jsonl")
    for label in labels:
        path = out / ("run.trec" if label == "cross" else f"run_{label}.trec")
        run = run_of(path)
        assert {q: set(of) for q, of in run.items()} == {q: set(of) for q, of in qrels.items()}
        found = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "map"}).evaluate(run)
        for ours, theirs in (("mrr", "recip_rank"), ("map", "map")):
            mean = np.mean([of[theirs] for of in found.values()])
            assert result["metrics"][label][ours] == pytest.approx(mean, abs=1e-9)
    assert set(result["delta"]) == set(labels[1:])
    printed = capsys.readouterr().out
    for text in ("8.0 candidates a query of the data", "MRR  [95% interval]", "random nDCG@10"):
        assert text in printed


def test_a_retriever_and_an_earlier_evaluation_take_part_too(
    beir, labelled, reranker, tiny_base, tmp_path
):
    """Scoring a large set again, only to compare with it, costs hours."""
    first = evaluate.run(
        config(reranker, labelled, texts=str(beir), also=["bm25"], out=str(tmp_path / "first"))
    )
    second = evaluate.run(
        config(tiny_base, labelled, texts=str(beir), also=[str(tmp_path / "first")])
    )
    assert list(second["metrics"]) == [tiny_base.name, "first"]
    assert second["metrics"]["first"] == pytest.approx(first["metrics"]["cross"], abs=1e-12)
    values = [e["per_query"]["values"] for e in (first, second)]
    assert values[0]["cross"] == values[1]["first"]
    assert second["time"] == {}
    with pytest.raises(ValueError, match="is of another test set"):
        evaluate.run(config(tiny_base, beir, first_stage="bm25", also=[str(tmp_path / "first")]))


def by_hand(runs: list[dict], weights: list[float], qrels: dict) -> dict:
    """Mean metrics of runs fused query by query, through trec_eval."""
    fused: dict = {}
    for q in runs[0]:
        ids = sorted(runs[0][q])
        total = np.zeros(len(ids))
        for run, weight in zip(runs, weights, strict=True):
            x = np.array([run[q][d] for d in ids])
            total += weight * (x - x.mean()) / x.std() if x.std() else 0.0
        fused[q] = dict(zip(ids, total.tolist(), strict=True))
    names = ("recip_rank", "ndcg_cut_10")
    found = pytrec_eval.RelevanceEvaluator(qrels, set(names)).evaluate(fused)
    return {name: np.mean([of[name] for of in found.values()]) for name in names}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_scores_of_two_systems_are_averaged(
    weight, beir, labelled, reranker, tiny_base, tmp_path, capsys
):
    """Against the run files of the two, standardised and added by hand."""
    out = tmp_path / "out"
    settings = {"also": ["bm25"], "fuse": str(tiny_base), "fuse_weight": weight}
    result = evaluate.run(config(reranker, labelled, texts=str(beir), out=str(out), **settings))
    label = f"cross+{tiny_base.name}"
    assert list(result["metrics"]) == ["cross", "bm25", label] and label in result["delta"]
    assert result["fusion"] == {"with": str(tiny_base), "weight": weight, "label": label}
    assert f"fused: {weight:g} of the model's scores, given" in capsys.readouterr().out
    evaluate.run(
        config(tiny_base, labelled, texts=str(beir), also=["random"], out=str(tmp_path / "other"))
    )
    runs = [run_of(folder / "run.trec") for folder in (out, tmp_path / "other")]
    expected = by_hand(runs, [weight, 1 - weight], labels_in(labelled / "test.jsonl"))
    assert result["metrics"][label]["mrr"] == pytest.approx(expected["recip_rank"], abs=1e-9)
    assert result["metrics"][label]["ndcg@10"] == pytest.approx(expected["ndcg_cut_10"], abs=1e-9)


def test_the_weight_is_chosen_on_the_dev_split(beir, labelled, reranker, tmp_path):
    """Against every weight by itself on that split; the test split must have no say."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    rows = (labelled / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "dev.jsonl").write_text("".join(rows[:96]))
    (folder / "test.jsonl").write_text("".join(rows[96:]))
    given = {"texts": str(beir), "fuse": "bm25"}
    result = evaluate.run(config(reranker, folder, **given))
    chosen = result["fusion"]
    assert len(chosen["dev"]) == 21 and len(set(chosen["dev"].values())) > 3
    for weight in ("0", "0.35", "0.8", "1"):
        alone = evaluate.run(
            config(reranker, folder, split="dev", fuse_weight=float(weight), **given)
        )
        assert chosen["dev"][weight] == alone["metrics"]["cross+bm25"]["ndcg@10"]
    assert chosen["dev"][f"{chosen['weight']:g}"] == max(chosen["dev"].values())
    same = evaluate.run(config(reranker, folder, fuse_weight=chosen["weight"], **given))
    assert same["metrics"] == result["metrics"]
    (folder / "test.jsonl").write_text("".join(rows[96:120]))
    assert evaluate.run(config(reranker, folder, **given))["fusion"] == chosen


def test_a_first_stage_is_fused_with_what_reranks_it(beir, reranker, tiny_base):
    """Only its first documents are; the first stage itself may be the other system."""
    for first in ("bm25", str(tiny_base)):
        given = {"first_stage": first, "rerank_k": 12, "fuse": str(tiny_base), "fuse_weight": 0.0}
        metrics = evaluate.run(config(reranker, beir, **given))["metrics"]
        both = metrics[f"cross+{tiny_base.name}"]
        assert both["recall@100"] == metrics["cross"]["recall@100"]
        if first == str(tiny_base):  # its own order again
            assert both == metrics[tiny_base.name]


def test_a_fusion_that_cannot_be_is_said(beir, labelled, reranker, tmp_path):
    texts = {"texts": str(beir)}
    with pytest.raises(ValueError, match=r"(?s)chosen on split dev: .*; or give .*fuse_weight=0.5"):
        evaluate.run(config(reranker, labelled, fuse="bm25", **texts))
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "dev.jsonl").write_bytes((labelled / "test.jsonl").read_bytes())
    with pytest.raises(ValueError, match="split=dev would be judged by a weight chosen on it"):
        evaluate.run(config(reranker, folder, split="dev", fuse="bm25", **texts))
    with pytest.raises(ValueError, match="split=validation would be judged by a weight chosen"):
        evaluate.run(config(reranker, folder, split="validation", fuse="bm25", **texts))
    with pytest.raises(ValueError, match="would be judged by a weight chosen on it"):
        evaluate.run(config(reranker, folder / "dev.jsonl", fuse="bm25", **texts))
    with pytest.raises(ValueError, match="has no score for every candidate"):
        (tmp_path / "a.trec").write_text("q0 Q0 d0 1 1.0 x\n")
        evaluate.run(config(reranker, labelled, fuse=str(tmp_path / "a.trec"), **texts))
    with pytest.raises(ValueError, match=r"fuse_weight \(0.5\) must be in \[0, 1\], and goes with"):
        config(reranker, labelled, fuse_weight=0.5)
    with pytest.raises(ValueError, match="is the model itself"):
        config("bm25", labelled, fuse="bm25")


def test_what_does_not_go_together_is_said(beir, labelled, reranker, tiny_base, tmp_path):
    with pytest.raises(ValueError, match=r"brings none; add first_stage=bm25"):
        evaluate.run(config(reranker, beir))
    with pytest.raises(ValueError, match=r"is a cross-encoder, which cannot search"):
        evaluate.run(config(tiny_base, beir, first_stage=str(reranker)))
    with pytest.raises(ValueError, match=r"random is an order by chance, which cannot search"):
        evaluate.run(config(reranker, beir, first_stage="random"))
    with pytest.raises(ValueError, match=r"is a cross-encoder.* also="):
        evaluate.run(config(tiny_base, beir, against=str(reranker)))
    with pytest.raises(ValueError, match=r"precision \(int8\) is of the vectors that a"):
        evaluate.run(config(reranker, labelled, texts=str(beir), precision="int8"))
    with pytest.raises(ValueError, match=r"compares retrievers; put it in also="):
        evaluate.run(config(reranker, labelled, texts=str(beir), against="bm25"))
    with pytest.raises(ValueError, match=r"eval\.json is a file, which has no score"):
        (tmp_path / "eval.json").write_text("{}")
        evaluate.run(config(tmp_path / "eval.json", labelled, texts=str(beir), also=["bm25"]))
    with pytest.raises(ValueError, match=r"bm25 is named twice"):
        evaluate.run(config(reranker, labelled, texts=str(beir), also=["bm25", "bm25"]))
    with pytest.raises(ValueError, match=r"(?s)^(?!.*data\.texts).*texts"):
        evaluate.run(config(reranker, labelled, texts=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"rerank_k \(0\) must be >= 1"):
        config(reranker, beir, rerank_k=0)


def test_an_evaluation_of_an_older_version_in_the_folder_is_told_apart(beir, reranker, tmp_path):
    """Its eval.json has no first_stage=: it counts as unset, not as agreeing with anything."""
    out = tmp_path / "out"
    evaluate.run(config("bm25", beir, out=str(out)))
    content = json.loads((out / "eval.json").read_text())
    for key in ("first_stage", "rerank_k", "also", "texts"):
        del content[key]
    (out / "eval.json").write_text(json.dumps(content))
    evaluate.run(config("bm25", beir, out=str(out)))
    with pytest.raises(ValueError, match=r"first_stage was None, now 'bm25'"):
        (out / "eval.json").write_text(json.dumps(content | {"model": str(reranker)}))
        evaluate.run(config(reranker, beir, out=str(out), first_stage="bm25"))


def test_other_candidates_are_another_test_set():
    """Fewer of them make the task easier: such an eval.json must not be compared with."""
    from data.records import RerankSet
    from evals.eval_file import digest_of

    def digest(candidates):
        ids = ["a", "b", "c"]
        return digest_of(RerankSet("s", ids, ids, ["q"], ["q"], {"q": {"a": 1}}, candidates))

    assert digest({"q": ["a", "b"]}) == digest({"q": ["b", "a"]})
    assert len({digest(c) for c in (None, {"q": ["a", "b"]}, {"q": ["a", "b", "c"]})}) == 3


def test_models_of_the_same_name_are_told_apart():
    """runs/a/default/seed0 and runs/b/default/seed0 must not become one row."""
    from evals.systems import labels_of

    assert labels_of(["/x/runs/a/default/seed0", "/x/runs/b/default/seed0/export"]) == [
        "a/default/seed0",
        "b/default/seed0",
    ]
    assert labels_of(["m/tiny", "other/tiny", "bm25"]) == ["m/tiny", "other/tiny", "bm25"]
    assert labels_of(["tiny", "x/tiny"]) == ["tiny", "x/tiny"]


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("dims=384,128", r"write 'dims=\[384,128\]'"),
        ("dims=384", r"write 'dims=\[384\]'"),
        ("also=bm25,random", r"write 'also=\[bm25,random\]'"),
    ],
)
def test_a_list_without_brackets_is_answered_with_the_remedy(typed, hint):
    """Hydra speaks of sweeps, and OmegaConf of a ListConfig."""
    with pytest.raises(UsageError, match=hint):
        prepare_overrides([typed], EvaluateConfig, {}, "evaluate.py", is_multirun=False)


def test_paths_in_a_list_need_no_quotes():
    """A run's folder may hold =, spaces or Arabic letters."""
    word = "also=[bm25,runs/a=b/x y,\u0646\u0645\u0648\u0630\u062c,1e3]"
    (made,) = prepare_overrides([word], EvaluateConfig, {}, "evaluate.py", is_multirun=False)
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = OverridesParser.create().parse_override(made).value()
    assert [getattr(v, "text", v) for v in value] == [
        "bm25", "runs/a=b/x y", "\u0646\u0645\u0648\u0630\u062c", "1e3",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_line_gives_the_same_numbers_twice(
    beir, labelled, reranker, tiny_base, tmp_path
):
    """Under another hash seed; the clock's part alone may differ."""
    contents = []
    for seed in "12":
        command = [
            sys.executable, str(ROOT / "evaluate.py"), f"model={reranker}", f"data={labelled}",
            f"texts={beir}", f"also=[random,{tiny_base}]", "device=cpu", f"out={tmp_path / seed}",
        ]  # fmt: skip
        env = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / seed / "eval.json").read_text())
        assert content.pop("time")
        runs = {p.name: p.read_bytes() for p in (tmp_path / seed).glob("*.trec")}
        contents.append((content, runs))
    assert contents[0] == contents[1]
