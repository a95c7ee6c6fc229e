"""evaluate.py from settings to eval.json, run.trec and tables."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

import evals.systems
import evaluate
from conf.schema import EvaluateConfig, SourceConfig
from data.formats import read_retrieval_set
from models.pretrained import load_towers

ROOT = Path(__file__).parents[2]
WORDS = "red green blue fish whale fox apple pear stone river mountain cloud".split()


@pytest.fixture
def beir(tmp_path) -> Path:
    """80 documents of three words (copies among them), 30 queries, grades 1 and 2."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    texts = [" ".join(rng.choice(WORDS, 3)) for _ in range(80)]
    texts[7] = texts[61] = texts[3]
    corpus = [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": " ".join(rng.choice(WORDS, 2))} for i in range(30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    rows = [f"q{i}\td{rng.integers(80)}\t{rng.integers(1, 3)}" for i in range(30)]
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n"
    )
    return folder


def config(model, data, **rest) -> EvaluateConfig:
    return EvaluateConfig(model=str(model), data=str(data), device="cpu", **rest)


def test_a_model_is_evaluated_at_every_dim_from_one_encoding(
    beir, tiny_base, tmp_path, monkeypatch, capsys
):
    """sentence-transformers encodes the corpus again for each dim; here it is read once."""
    from evals import encode as module

    encoded = []
    original = module.encode

    def counted(towers, texts, side, **options):
        encoded.extend((side, text) for text in texts)
        return original(towers, texts, side, **options)

    monkeypatch.setattr(module, "encode", counted)
    out = tmp_path / "out"
    result = evaluate.run(config(tiny_base, beir, dims=[4, 16, 8], out=str(out)))
    assert len(encoded) == len(set(encoded)) < 110  # 80 + 30 texts, copies among them
    assert list(result["metrics"]) == ["16", "8", "4", "bm25"]
    assert result["bytes_per_document"] == {"16": 64, "8": 32, "4": 16}
    assert sorted(p.name for p in out.iterdir()) == [
        "eval.json", "run.trec", "run_4.trec", "run_8.trec", "run_bm25.trec",
    ]  # fmt: skip
    assert json.loads((out / "eval.json").read_text()) == result
    printed = capsys.readouterr().out
    for text in ("dim 16", "dim 4", "BM25", "30 queries, 80 documents", "nDCG@10"):
        assert text in printed


def test_trec_eval_reads_the_same_numbers_from_the_run_files(beir, tiny_base, tmp_path):
    """Copies of a document tie: the written scores must leave the order of ties to the ids."""
    out = tmp_path / "out"
    result = evaluate.run(config(tiny_base, beir, dims=[16, 4], precision="binary", out=str(out)))
    qrels: dict = {}
    for line in (beir / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, doc, grade = line.split("\t")
        qrels.setdefault(query, {})[doc] = int(grade)
    for name, label in (("run.trec", "16"), ("run_4.trec", "4"), ("run_bm25.trec", "bm25")):
        with open(out / name, encoding="utf-8") as f:
            run = pytrec_eval.parse_run(f)
        found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "map_cut_100"}).evaluate(run)
        for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("map@100", "map_cut_100")):
            mean = sum(found.get(q, {theirs: 0})[theirs] for q in qrels) / len(qrels)
            assert abs(result["metrics"][label][ours] - mean) <= 1e-9


def test_several_precisions_come_from_one_encoding_and_equal_those_asked_alone(
    beir, tiny_base, tmp_path, monkeypatch, capsys
):
    """Three encodings of a corpus to see what smaller vectors cost would cost more than they."""
    from evals import systems

    calls = []
    original = systems.encode_sets
    monkeypatch.setattr(
        systems, "encode_sets", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    asked = ["fp32", "int8", "binary"]
    options = {"dims": [8, 16], "bm25": False}
    both = config(tiny_base, beir, precision=asked, out=str(tmp_path / "both"), **options)
    result = evaluate.run(both)
    assert len(calls) == 1
    printed = capsys.readouterr().out
    assert "dim 16, int8" in printed and "fp32, int8, binary document vectors" in printed
    labels = [f"{dim} {precision}" for dim in (16, 8) for precision in asked]
    assert list(result["metrics"]) == labels
    assert result["bytes_per_document"]["8 binary"] == 1
    names = ["eval.json", "run.trec", *(f"run_{k.replace(' ', '_')}.trec" for k in labels[1:])]
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == sorted(names)
    for precision in asked:
        out = tmp_path / precision
        alone = evaluate.run(config(tiny_base, beir, precision=precision, out=str(out), **options))
        for dim in ("16", "8"):
            assert alone["metrics"][dim] == result["metrics"][f"{dim} {precision}"]
            assert (
                alone["per_query"]["values"][dim]
                == (result["per_query"]["values"][f"{dim} {precision}"])
            )
    one = config(tiny_base, beir, precision=["int8"], out=str(tmp_path / "int8"), **options)
    evaluate.run(one)  # a list of one is the same evaluation


def test_against_compares_the_same_precision(beir, tiny_base, tmp_path, monkeypatch):
    """An eval.json of one precision among several, and of several beside one."""
    options = {"dims": [8], "bm25": False}
    several = ["int8", "binary"]
    one, both, binary = (str(tmp_path / name) for name in ("one", "both", "binary"))
    evaluate.run(config(tiny_base, beir, precision="int8", out=one, **options))
    evaluate.run(config(tiny_base, beir, precision="binary", out=binary, **options))

    def labels_and_diffs(**asked):
        found = evaluate.run(config(tiny_base, beir, **options, **asked))["against_result"]
        return found["label"], {k: v["ndcg@10"]["diff"] for k, v in found["delta"].items()}

    same = {"8 int8": "8 int8", "8 binary": "8 binary"}
    zero = dict.fromkeys(same, 0.0)
    assert labels_and_diffs(precision=several, against=str(tiny_base), out=both) == (same, zero)
    assert labels_and_diffs(precision=several, against=both) == (same, zero)
    assert labels_and_diffs(precision="binary", against=both) == ({"8": "8"}, {"8": 0.0})
    # two evaluations at one precision each are compared whatever it is
    assert labels_and_diffs(precision="binary", against=one)[1]["8"] != 0
    with pytest.raises(ValueError, match="no results at 8 dimensions and binary, only at 8 int8"):
        labels_and_diffs(precision=several, against=one)
    with pytest.raises(ValueError, match="no results at 8 dimensions, only at 8 int8, 8 binary"):
        labels_and_diffs(precision="fp32", against=both)
    del options["dims"]
    monkeypatch.setattr(evals.systems, "encode_sets", lambda *a, **k: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="no results at binary, only at 8 int8; evaluate it"):
        labels_and_diffs(precision=several, against=one)
    with pytest.raises(ValueError, match="no results at one precision, only at 8 int8, 8 binary"):
        labels_and_diffs(precision="fp32", against=both)
    monkeypatch.undo()
    options["dims"] = [8]
    bm25 = evaluate.run(config("bm25", beir, against=both, precision=several))["against_result"]
    assert bm25["label"] == {"bm25": "8 int8"}
    label, _ = labels_and_diffs(precision=several, against="bm25")
    assert label == {"8 int8": "bm25", "8 binary": "bm25"}
    with pytest.raises(ValueError, match="must be one, or a list of different ones"):
        config(tiny_base, beir, precision=["int8", "int8"])
    with pytest.raises(ValueError, match="candidates need none"):
        evaluate.run(config(tiny_base, beir, precision=several, first_stage="bm25"))


@pytest.mark.slow
def test_a_second_run_writes_the_same_bytes(beir, tiny_base, tmp_path):
    """In another process, under another hash seed and from the command line."""
    command = [
        sys.executable, str(ROOT / "evaluate.py"), f"model={tiny_base}", f"data={beir}",
        "dims=[16,8]", "precision=int8", "device=cpu", f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    contents = []
    for seed in "12":
        env = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "dim 16" in done.stdout
        contents.append({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 4


def test_prompts_are_for_folders_that_name_none(beir, tiny_base, tmp_path, monkeypatch):
    """A base of the hub without the prompts that it was trained with is no fair baseline; a folder
    that has prompts keeps its own."""
    from evals import systems

    given = {"query_prompt": "red ", "passage_prompt": "fox "}
    found = evaluate.run(config(tiny_base, beir, **given))["metrics"]
    plain = evaluate.run(config(tiny_base, beir))["metrics"]
    assert found != plain
    towers = load_towers(tiny_base)
    towers.spec.query_prompt, towers.spec.passage_prompt = "red ", "fox "
    monkeypatch.setattr(systems, "load_towers", lambda model: towers)
    assert evaluate.run(config(tiny_base, beir))["metrics"] == found
    assert evaluate.run(config(tiny_base, beir, query_prompt="blue "))["metrics"] == found


def test_against_adds_paired_differences(beir, tiny_base, tmp_path, capsys):
    """Against BM25, against a model, and against the eval.json of an earlier evaluation."""
    first = evaluate.run(config(tiny_base, beir, dims=[8], out=str(tmp_path / "first"), bm25=False))
    for against in (tmp_path / "first", tmp_path / "first" / "eval.json", tiny_base):
        other = evaluate.run(config("bm25", beir, against=str(against), dims=[8]))["against_result"]
        delta = other["delta"]["bm25"]["ndcg@10"]
        assert other["label"] == {"bm25": "8"}
        mine = other["metrics"]["bm25"]["ndcg@10"] + delta["diff"]
        values = evaluate.run(config("bm25", beir))["metrics"]["bm25"]
        assert mine == pytest.approx(values["ndcg@10"], abs=1e-12) and delta["n"] == 30
        assert other["metrics"]["bm25"] == pytest.approx(first["metrics"]["8"], abs=1e-12)
    capsys.readouterr()
    same = evaluate.run(config(tiny_base, beir, dims=[8], against=str(tiny_base)))["against_result"]
    assert same["delta"]["8"]["ndcg@10"] == {"diff": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "n": 30}
    assert f"against {tiny_base}" in capsys.readouterr().out
    for options, told in (({"bm25": False}, 1), ({}, 0)):  # said once: here, or as gain over BM25
        evaluate.run(config(tiny_base, beir, dims=[8], against="bm25", **options))
        printed = capsys.readouterr().out
        assert printed.count("against bm25") == told and printed.count("dim 8 nDCG@10") == 1


def test_bm25_alone_and_without_bm25(beir, tiny_base):
    assert list(evaluate.run(config("bm25", beir))["metrics"]) == ["bm25"]
    result = evaluate.run(config(tiny_base, beir, bm25=False, top_k=10))
    assert list(result["metrics"]) == ["16"]
    assert "recall@100" not in result["metrics"]["16"]


def test_another_evaluation_is_not_overwritten(beir, tmp_path):
    """The same evaluation may be repeated; another one in the same folder is a mistake."""
    out = str(tmp_path / "out")
    evaluate.run(config("bm25", beir, out=out))
    evaluate.run(config("bm25", beir, out=out))
    with pytest.raises(ValueError, match=r"holds another evaluation \(top_k was 100, now 50\)"):
        evaluate.run(config("bm25", beir, out=out, top_k=50))
    (tmp_path / "out" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON as evaluate\.py writes it"):
        evaluate.run(config("bm25", beir, out=out))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; want a folder"):
        evaluate.run(config("bm25", beir, out=str(tmp_path / "file")))


def test_errors_name_what_is_wrong(beir, tiny_base, tmp_path):
    with pytest.raises(ValueError, match=r"^data=.*no split 'dev'.*test"):
        evaluate.run(config("bm25", beir, split="dev"))
    with pytest.raises(ValueError, match=r"dims: 32 is more than .* has; its embeddings have 16"):
        evaluate.run(config(tiny_base, beir, dims=[32]))
    with pytest.raises(ValueError, match="nowhere"):
        evaluate.run(config("bm25", tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nothing_here"):
        evaluate.run(config(tmp_path / "nothing_here", beir))
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate.run(config("bm25", beir, against=str(tmp_path / "missing.json")))


def test_bad_rows_stop_an_evaluation_or_are_skipped_counted_and_listed(beir, tmp_path, capsys):
    """One broken line of somebody else's corpus must not make it useless."""
    with open(beir / "corpus.jsonl", "a") as f:
        f.write('{"_id": "d80"}\n')
    with open(beir / "qrels" / "test.tsv", "a") as f:
        f.write("q1\tnowhere\t1\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:81: .*; on_bad_row=skip leaves bad rows"):
        evaluate.run(config("bm25", beir))
    out = tmp_path / "out"
    result = evaluate.run(config("bm25", beir, on_bad_row="skip", out=str(out)))
    assert result["num_bad_rows"] == 2 and result["num_queries"] == 30
    assert json.loads((out / "eval.json").read_text())["num_bad_rows"] == 2
    listed = [json.loads(line)["where"] for line in open(out / "bad_rows.jsonl")]
    assert listed == [f"{beir}/corpus.jsonl:81", f"{beir}/qrels/test.tsv:32"]
    assert "80 documents, 2 bad rows left out" in capsys.readouterr().out
    options = {"first_stage": "bm25", "rerank_k": 10, "on_bad_row": "skip"}
    assert evaluate.run(config("random", beir, **options))["num_bad_rows"] == 2
    with pytest.raises(ValueError, match=r"on_bad_row \('drop'\) must be one of error, skip"):
        config("bm25", beir, on_bad_row="drop")


def test_queries_that_no_split_judges_are_left_out_and_counted(beir, tmp_path, capsys):
    """Queries of the other splits are not unjudged; without a judgement none can be right."""
    with open(beir / "queries.jsonl", "a") as f:
        f.writelines(json.dumps({"_id": f"more{i}", "text": "red fish"}) + "\n" for i in range(5))
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nmore1\td1\t1\n")
    (beir / "qrels" / "dev.tsv").write_text("")  # nobody asked for it
    result = evaluate.run(config("bm25", beir))
    assert (result["num_queries"], result["num_unjudged"]) == (30, 4)
    assert "30 queries, 4 unjudged left out, 80 documents" in capsys.readouterr().out
    assert evaluate.run(config("random", beir, first_stage="bm25"))["num_unjudged"] == 4


def test_against_results_of_other_data_is_refused(beir, tmp_path):
    """Same ids, another judgement: a paired test would compare apples and pears."""
    evaluate.run(config("bm25", beir, out=str(tmp_path / "before")))
    qrels = beir / "qrels" / "test.tsv"
    lines = qrels.read_text().splitlines()
    lines[1] = lines[1][:-1] + ("1" if lines[1].endswith("2") else "2")
    qrels.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="is of another test set"):
        evaluate.run(config("bm25", beir, against=str(tmp_path / "before")))


def test_against_eval_without_the_asked_dim_is_refused(beir, tiny_base, tmp_path):
    evaluate.run(config(tiny_base, beir, dims=[16], out=str(tmp_path / "before"), bm25=False))
    with pytest.raises(ValueError, match="has no results at 8 dimensions, only at 16"):
        evaluate.run(config(tiny_base, beir, dims=[8], against=str(tmp_path / "before")))


@pytest.fixture
def no_encoding(monkeypatch) -> None:
    from evals import systems

    def load(model, *_):
        raise AssertionError(f"{model} is loaded, to encode")

    monkeypatch.setattr(systems, "load_retriever", load)


@pytest.mark.parametrize("settings", [{}, {"first_stage": "bm25"}])
def test_ids_that_no_run_file_takes_are_refused_before_anything_is_encoded(
    settings, beir, tiny_base, tmp_path, no_encoding
):
    """After an hour of encoding the metrics would be printed, and eval.json not written."""
    corpus = beir / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"d0"', '"d 0"'))
    qrels = beir / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().replace("\td0\t", "\td 0\t"))
    with pytest.raises(ValueError, match="document id 'd 0' cannot stand in a TREC run file"):
        evaluate.run(config(tiny_base, beir, out=str(tmp_path / "out"), **settings))
    with pytest.raises(AssertionError, match="to encode"):
        evaluate.run(config(tiny_base, beir, **settings))


def test_an_asked_dim_that_against_lacks_is_refused_before_anything_is_encoded(
    beir, tiny_base, tmp_path, request
):
    evaluate.run(config(tiny_base, beir, dims=[16], out=str(tmp_path / "before"), bm25=False))
    request.getfixturevalue("no_encoding")
    with pytest.raises(ValueError, match="has no results at 8 dimensions, only at 16"):
        evaluate.run(config(tiny_base, beir, dims=[16, 8], against=str(tmp_path / "before")))
    with pytest.raises(AssertionError, match="to encode"):
        evaluate.run(config(tiny_base, beir, dims=[16], against=str(tmp_path / "before")))


def test_importing_evaluate_loads_nothing_heavy():
    """A library named evaluate exists: whoever imports that name must not start torch or Hydra."""
    code = (
        "import sys, evaluate; print([m for m in ('torch', 'hydra', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_file_without_splits_is_evaluated_whole(tmp_path):
    """A user's own rows in one file are a test set; asked for another split they are none."""
    rows = [{"query": f"the {w}", "positive": f"{w} and more"} for w in ("fox", "pear", "cloud")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = evaluate.run(config("bm25", path))
    assert result["num_queries"] == 3 and result["metrics"]["bm25"]["accuracy@1"] == 1
    with pytest.raises(ValueError, match="no splits of its own, so there is no 'dev'"):
        evaluate.run(config("bm25", path, split="dev"))


def test_rows_whose_numbers_meet_lose_no_answer_and_beir_says_what_it_leaves_out(
    beir, tmp_path, caplog
):
    """Rows number queries and passages apart; in a BEIR folder one id is one text."""
    rows = [
        {"query_id": i, "query": f"the {w}", "positive": f"{w} and more", "positive_id": i}
        for i, w in enumerate(("fox", "pear", "cloud"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for settings in ({"model": "bm25"}, {"model": "random", "first_stage": "bm25"}):
        result = evaluate.run(config(data=path, **settings))
        assert result["metrics"]["bm25"]["accuracy@1"] == 1, settings
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    qrels = beir / "qrels" / "test.tsv"
    asked = qrels.read_text().splitlines()[1].split("\t")[0]
    text = (beir / "corpus.jsonl").read_text()
    (beir / "corpus.jsonl").write_text(text + json.dumps({"_id": asked, "text": "itself"}) + "\n")
    qrels.write_text(qrels.read_text() + f"{asked}\t{asked}\t1\n")
    assert read_retrieval_set(SourceConfig(root=str(beir)), "test").shares_ids
    assert "1 queries are answered by the document that has their own id" in caplog.text
