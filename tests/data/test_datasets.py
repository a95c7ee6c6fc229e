"""From a source to a training store and retrieval sets: right texts, splits, cache and counts."""

import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from conf.schema import DataConfig, SourceConfig
from data import reading
from data.batches import Batches
from data.datasets import open_data
from data.splits import component_keys, incidences
from data.stored import stored_examples
from data.toy import toy_examples
from evals.publish import data_facts

ROOT = Path(__file__).parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"
SPEC = SimpleNamespace(
    query_prompt="",
    passage_prompt="",
    prompt_in_pooling=True,
    max_query_length=64,
    max_passage_length=64,
)


def letters() -> Tokenizer:
    """One token a character, so that texts can be read back from tokens."""
    vocab = {chr(c): c for c in range(32, 127)} | {"[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def read_back(tokens) -> str:
    return "".join(map(chr, tokens.tolist()))


def open_some(tmp_path: Path, spec=SPEC, *, seed: int = 0, **settings):
    c = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
    return open_data(c, spec, letters(), letters(), seed=seed, vocab_size=127)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def pairs(num: int, letter: str = "") -> list[dict]:
    return [{"query": f"{letter}q{i}", "positive": f"{letter}p{i}"} for i in range(num)]


def triples(data) -> Counter:
    """(query, positives, negatives) of every training example, as text."""
    found: Counter = Counter()
    for s in data.train.sets:
        for e in range(len(s.query_E)):
            sides = [
                tuple(
                    sorted(
                        read_back(s.passages[p])
                        for p in ragged.values[ragged.offsets[e] : ragged.offsets[e + 1]]
                    )
                )
                for ragged in (s.positives, s.negatives)
            ]
            found[read_back(s.queries[s.query_E[e]]), *sides] += 1
    return found


def beir(root: Path, judged: dict[str, list[tuple[int, int]]], num_docs: int = 30) -> Path:
    """A BEIR folder; judged: split -> (query number, document number)."""
    docs = [{"_id": f"d{i}", "title": f"t{i}", "text": f"body {i}"} for i in range(num_docs)]
    write_rows(root / "corpus.jsonl", docs)
    numbers = sorted({q for rows in judged.values() for q, _ in rows})
    write_rows(root / "queries.jsonl", [{"_id": f"q{i}", "text": f"ask {i}"} for i in numbers])
    for split, rows in judged.items():
        path = root / "qrels" / f"{split}.tsv"
        path.parent.mkdir(exist_ok=True)
        lines = ["query-id\tcorpus-id\tscore", *(f"q{q}\td{d}\t1" for q, d in rows)]
        path.write_text("\n".join(lines) + "\n")
    return root


# -- what is read -------------------------------------------------------------------------------


def test_toy_examples_arrive_as_they_were_made(tmp_path):
    spec = SimpleNamespace(**{**vars(SPEC), "max_query_length": 999, "max_passage_length": 999})
    data = open_some(tmp_path, spec, format="toy")
    wanted = Counter(
        (e.query, tuple(sorted(e.positives)), tuple(sorted(e.negatives)))
        for e in toy_examples("train")
    )
    assert triples(data) == wanted
    for split, sets in (("dev", data.dev), ("test", data.test)):
        assert list(sets) == [split]
        one = sets[split]
        text = dict(zip(one.doc_ids, one.doc_texts, strict=True))
        judged = [
            (q, [text[d] for d in one.qrels[i]])
            for i, q in zip(one.query_ids, one.query_texts, strict=True)
        ]
        assert judged == [(e.query, e.positives) for e in toy_examples(split)]


def test_files_with_splits_keep_them(tmp_path):
    root = tmp_path / "data"
    for split, letter in (("train", "a"), ("validation", "b"), ("test", "c")):
        write_rows(root / f"{split}.jsonl", pairs(5, letter))
    data = open_some(tmp_path, root=str(root))
    assert triples(data) == {(f"aq{i}", (f"ap{i}",), ()): 1 for i in range(5)}
    assert data.dev["dev"].query_texts == [f"bq{i}" for i in range(5)]
    assert data.test["test"].doc_texts == [f"cp{i}" for i in range(5)]
    split = data.report["data_sets"]["data"]["split"]
    assert split["own"] == {"train": "train", "dev": "validation", "test": "test"}


def test_the_log_says_what_files_are_read_as(tmp_path, caplog):
    """A user's test file among the training rows must not go unsaid; shards are one file."""
    caplog.set_level(logging.INFO)
    for names, words in (
        (("squad_train", "squad_test"), "split test is squad_test.jsonl"),
        (("one", "two"), "2 files are read as one set"),
        (("rows-00000-of-00002", "rows-00001-of-00002"), None),
        (("train", "test"), None),
    ):
        caplog.clear()
        root = tmp_path / names[0]
        for name in names:
            write_rows(root / f"{name}.jsonl", pairs(20, name))
        data = open_some(tmp_path, root=str(root), dev_fraction=0.1)
        told = [m for m in caplog.messages if "split train is" in m or "as one set" in m]
        assert bool(told) == bool(words) and (words or "") in caplog.text, names
        own = data.report["data_sets"]["data"]["split"]["own"]
        assert own["test"] == ("test" if names[1].endswith("test") else None)


def test_one_file_is_split_by_shared_texts(tmp_path):
    """No query and no passage may be on both sides, or held-out numbers mean nothing."""
    rows = [{"query": f"q{i // 2}", "positive": f"p{i // 3}"} for i in range(0, 300)]
    rows = [r for i, r in enumerate(rows) if i % 12 < 10]  # groups, not one chain
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = open_some(tmp_path, root=str(path))
    texts = {"train": {t for q, p, _ in triples(data) for t in (q, *p)}}
    for split, one in (("dev", data.dev["dev"]), ("test", data.test["test"])):
        texts[split] = {*one.query_texts, *one.doc_texts}
        assert 0 < len(one.query_ids) < 40
    assert not texts["train"] & texts["dev"]
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    rows_out = data.report["data_sets"]["data"]["split"]["rows"]
    assert rows_out["train"] == data.train.num_examples
    assert sum(rows_out.values()) == len(rows)
    exact = data.report["data_sets"]["data"]["leakage"]["pairs"]["train/test"]
    assert exact["exact_queries"] == exact["exact_positives"] == 0
    other = open_some(tmp_path, root=str(path), split_seed=1)
    assert other.test["test"].query_texts != data.test["test"].query_texts


def test_a_missing_dev_split_is_held_out_of_training(tmp_path):
    """A BEIR folder with train and test alone: dev queries over the whole corpus."""
    judged = {"train": [(i, i % 25) for i in range(100)], "test": [(200 + i, i) for i in range(9)]}
    data = open_some(tmp_path, root=str(beir(tmp_path / "beir", judged)))
    dev, test = data.dev["dev"], data.test["test"]
    assert dev.doc_ids == test.doc_ids == [f"d{i}" for i in range(30)]
    assert dev.doc_texts[3] == "t3 body 3"
    assert test.query_ids == [f"q{200 + i}" for i in range(9)]
    trained = {q for q, _, _ in triples(data)}
    assert 0 < len(dev.query_ids) <= 12
    assert trained.isdisjoint(dev.query_texts)
    assert len(trained) + len(dev.query_ids) == 100
    for q in dev.query_ids:
        assert dev.qrels[q] == {f"d{int(q[1:]) % 25}": 1}


def test_held_out_rows_stay_few_however_long_the_file(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", pairs(200))
    data = open_some(tmp_path, root=str(path), max_held_out=7)
    assert len(data.dev["dev"].query_ids) == len(data.test["test"].query_ids) == 7
    assert data.train.num_examples == 186
    assert data.report["data_sets"]["data"]["split"]["max_held_out"] == 7
    unlimited = open_some(tmp_path, root=str(path), max_held_out=None)  # not the cached set
    assert len(unlimited.test["test"].query_ids) == 20
    with pytest.raises(ValueError, match=r"data.max_held_out \(0\) must be > 0 rows"):
        DataConfig(root=str(path), max_held_out=0)


def test_without_fractions_nothing_is_held_out(tmp_path, caplog):
    path = write_rows(tmp_path / "pairs.jsonl", pairs(20))
    data = open_some(tmp_path, root=str(path), dev_fraction=0.0, test_fraction=0.0)
    assert data.train.num_examples == 20 and data.dev == data.test == {}
    assert "no dev queries" in caplog.text and "no test queries" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_split": "tran"}, r"no split 'tran' to take for train; it has train, dev"),
        ({"dev_split": "val2"}, r"no split 'val2' to take for dev"),
        ({"dev_split": "dev", "test_split": "dev"}, "both 'dev'"),
    ],
)
def test_a_split_that_is_not_there_is_named(tmp_path, settings, words):
    for split in ("train", "dev"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", pairs(20, split))
    with pytest.raises(ValueError, match=words):
        open_some(tmp_path, root=str(tmp_path / "data"), **settings)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_named_split_of_data_without_splits_is_an_error(tmp_path, split):
    """Rows were held out at random, while the user took them for the split of that name."""
    path = write_rows(tmp_path / "pairs.jsonl", pairs(20))
    wanted = rf"pairs.jsonl has no splits of its own, got data.{split}_split=gold; give a folder"
    with pytest.raises(ValueError, match=wanted):
        open_some(tmp_path, root=str(path), **{f"{split}_split": "gold"})
    open_some(tmp_path, root=str(path), **{f"{split}_split": split})


@pytest.mark.parametrize("names", [("Train", "Dev", "Test"), ("TRAIN", "Valid", "testing")])
def test_capitals_of_a_file_name_hide_no_split(tmp_path, names):
    """Test.jsonl was left unread, and a test set held out of train beside it."""
    for split, name in zip(("train", "dev", "test"), names, strict=True):
        write_rows(tmp_path / "data" / f"{name}.jsonl", pairs(20, split))
    for settings in ({}, {"train_split": names[0]}, {"dev_split": names[1].lower()}):
        data = open_some(tmp_path, root=str(tmp_path / "data"), **settings)
        own = data.report["data_sets"]["data"]["split"]["own"]
        assert own == dict(zip(("train", "dev", "test"), names, strict=True))
        assert data.train.num_examples == 20 and len(data.test["test"].query_ids) == 20


def test_two_files_that_could_be_one_split_are_an_error(tmp_path, caplog):
    """Neither was read, and dev was held out of train."""
    for name in ("train", "val", "eval", "test"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", pairs(20, name))
    settings = {"root": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=r"'eval' and 'val' could both be .*set data.dev_split"):
        open_some(tmp_path, **settings)
    data = open_some(tmp_path, **settings, dev_split="val")
    assert set(data.dev["dev"].query_texts) == {f"valq{i}" for i in range(20)}
    assert "not read: eval.jsonl, since val is there too" in caplog.text
    write_rows(tmp_path / "data" / "dev.jsonl", pairs(20, "dev"))
    data = open_some(tmp_path, **settings)
    assert set(data.dev["dev"].query_texts) == {f"devq{i}" for i in range(20)}
    assert "not read: eval.jsonl, val.jsonl, since dev is there too" in caplog.text


def test_a_test_split_alone_is_no_training_data(tmp_path):
    root = beir(tmp_path / "beir", {"test": [(i, i) for i in range(20)]})
    with pytest.raises(ValueError, match="no split 'train' to take for train; it has test"):
        open_some(tmp_path, root=str(root))
    data = open_some(tmp_path, root=str(root), train_split="test")
    assert data.train.num_examples + len(data.dev["dev"].query_ids) < 20
    assert {q for q, _, _ in triples(data)}.isdisjoint(data.test["test"].query_texts)


def test_no_root_and_a_wrong_root_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        open_some(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        open_some(tmp_path, root=str(tmp_path / "nothing.jsonl"))


def test_negatives_that_answer_are_left_out_and_counted(tmp_path, caplog):
    """Mined negatives often contain positives of another row of the same query."""
    rows = [
        {"query": "q0", "positive": "a", "negative": ["b", "c", "c"]},
        {"query": "q0", "positive": "b", "negative": ["d"]},
        {"query": " q0", "positive": "e", "negative": ["e ", "a", "f"]},
    ]
    for split, some in (("train", rows), ("dev", pairs(3)), ("test", pairs(3, "t"))):
        write_rows(tmp_path / "data" / f"{split}.jsonl", some)
    data = open_some(tmp_path, root=str(tmp_path / "data"))
    assert triples(data) == {
        ("q0", ("a",), ("c",)): 1,
        ("q0", ("b",), ("d",)): 1,
        ("q0", ("e",), ("f",)): 1,
    }
    sizes = data.report["data_sets"]["data"]["train"]
    assert sizes["negatives"] == 3 and sizes["negatives_that_are_positives"] == 3
    assert "3 negatives are positives" in caplog.text
    batch = Batches(data.train, batch_size=3, seed=0).batch_at(0)
    columns = [read_back(t) for t in batch.passage_tokens]
    assert {columns[i] for i in batch.relatives_BK[0]} == {"a", "b", "e"}


def test_a_positive_given_twice_counts_once(tmp_path):
    """Each of n positives weighs 1 / n: a repeated one would take another's share."""
    rows = [{"query": "q0", "pos": ["a", "b", " a"], "neg": ["c"]}]
    others = [{"query": f"x{i}", "pos": [f"y{i}"], "neg": []} for i in range(3)]
    for split, some in (("train", rows), ("dev", others[:1]), ("test", others[1:])):
        write_rows(tmp_path / "data" / f"{split}.jsonl", some)
    data = open_some(tmp_path, root=str(tmp_path / "data"))
    assert triples(data) == {("q0", ("a", "b"), ("c",)): 1}
    assert Batches(data.train, batch_size=1, seed=0).batch_at(0).pair_weight_P.tolist() == [
        0.5,
        0.5,
    ]


def test_bad_rows_are_counted_and_listed_also_from_the_cache(tmp_path, caplog):
    path = write_rows(tmp_path / "pairs.jsonl", pairs(50))
    path.write_text(path.read_text() + '{"query": "x"}\nnot json\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:51: expected"):
        open_some(tmp_path, root=str(path))
    for _ in range(2):
        caplog.clear()
        data = open_some(tmp_path, root=str(path), on_bad_row="skip")
        bad = data.report["data_sets"]["data"]["bad_rows"]
        assert bad["count"] == 2 and "pairs.jsonl:51" in bad["first"]
        assert len(Path(bad["file"]).read_text().splitlines()) == 2
        assert "2 bad rows" in caplog.text
    assert sum(data.report["data_sets"]["data"]["split"]["rows"].values()) == 50


def test_labels_say_where_an_example_stands(tmp_path):
    rows = [{"id": f"n{i}", **r} for i, r in enumerate(pairs(4))]
    for split, some in (("train", rows), ("dev", pairs(3, "d")), ("test", pairs(3, "t"))):
        write_rows(tmp_path / "data" / f"{split}.jsonl", some)
    data = open_some(tmp_path, root=str(tmp_path / "data"))
    labels = Batches(data.train, batch_size=9, seed=0).batch_at(0).example_ids
    train = tmp_path / "data" / "train.jsonl"
    assert sorted(labels) == [f"n{i} ({train}:{i + 1})" for i in range(4)]


# -- evaluation sets ----------------------------------------------------------------------------


def test_all_passages_can_be_searched(tmp_path):
    for split, letter in (("train", "a"), ("dev", "b"), ("test", "c")):
        write_rows(tmp_path / "data" / f"{split}.jsonl", [*pairs(5, letter), *pairs(1, "same")])
    small = open_some(tmp_path, root=str(tmp_path / "data"))
    assert len(small.test["test"].doc_ids) == 6
    data = open_some(tmp_path, root=str(tmp_path / "data"), eval_corpus="all")
    for one, first in ((data.dev["dev"], "bp0"), (data.test["test"], "cp0")):
        assert one.doc_texts[0] == first
        assert sorted(one.doc_texts) == sorted(
            [f"{x}p{i}" for x in "abc" for i in range(5)] + ["samep0"]
        )
        assert len(set(one.doc_ids)) == 16
    assert data.test["test"].qrels == small.test["test"].qrels


def test_exact_leaks_are_counted_over_all_training_rows(tmp_path, monkeypatch, caplog):
    """Near duplicates are looked for in a sample; an exact count of a sample is no count."""
    monkeypatch.setattr("data.stored.MAX_LEAKAGE_EXAMPLES", 10)
    monkeypatch.setattr("data.reading.MAX_LEAKAGE_EXAMPLES", 10)
    monkeypatch.setattr("data.stored.HASH_BLOCK", 64)
    train = [{**row, "negative": f"n{i}"} for i, row in enumerate(pairs(300))]
    asked = [{"query": f"q{i}", "positive": f"t{i}"} for i in range(1, 300, 20)]
    answered = [{"query": f"a{i}", "positive": f"p{i}"} for i in range(5, 300, 30)]
    refused = [{"query": f"b{i}", "positive": f"n{i}"} for i in (7, 77, 277)]
    crossed = [{"query": "p33", "positive": "q44"}, {"query": "p298", "positive": "x"}]
    write_rows(tmp_path / "data" / "train.jsonl", train)
    write_rows(tmp_path / "data" / "test.jsonl", asked + answered + refused + crossed)
    caplog.set_level(logging.INFO)
    data = open_some(tmp_path, root=str(tmp_path / "data"), dev_fraction=0.0)
    leakage = data.report["data_sets"]["data"]["leakage"]
    exact = {k: n for k, n in leakage["pairs"]["train/test"].items() if k.startswith("exact")}
    assert exact == {
        "exact_queries": len(asked), "exact_positives": len(answered),
        "exact_negatives": len(refused), "exact_across": 3,
    }  # fmt: skip
    assert leakage["texts"]["train"] == {"queries": 300, "positives": 300, "negatives": 300}
    assert 500 < leakage["not_compared_for_near"] < 600
    note = f"{leakage['not_compared_for_near']} of 660 queries and positives"
    assert note in caplog.text and note in data_facts(data.report)["texts shared by splits"]


def test_python_sources_give_both_test_sets(tmp_path):
    """Held-out questions against held-out passages, and against the passages of every split."""
    for i in range(40):
        body = "\n".join(f"    v{j} = {i * j}" for j in range(12))
        source = f'def f{i}():\n    """Computes the value number {i}."""\n{body}\n'
        path = tmp_path / "code" / f"mod{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    data = open_some(tmp_path, format="pydocs", root=str(tmp_path / "code"))
    assert list(data.test) == ["test", "test-all"] and list(data.dev) == ["dev"]
    assert list(data.compared) == ["test"]
    named = replace(data, test={"latest-all": data.test["test"], "test-all": data.test["test"]})
    assert list(named.compared) == ["latest-all", "test-all"]  # a user's sets
    small, large = data.test.values()
    assert (
        len(large.doc_ids)
        == 40
        == data.train.num_examples + len(small.doc_ids) + len(data.dev["dev"].doc_ids)
    )
    assert set(small.doc_ids) < set(large.doc_ids)
    assert small.qrels == large.qrels and small.query_texts == large.query_texts
    # ids differ: evaluation skips a document that has the id of its query, as BEIR does
    assert all(judged == {q.removeprefix("q:"): 1} for q, judged in small.qrels.items())
    assert not set(large.doc_ids) & set(large.query_ids)
    assert data.report["data_sets"]["data"]["split"]["pairs"]["test"] == len(small.query_ids)


def test_fewer_dev_queries_keep_all_passages(tmp_path):
    whole = open_some(tmp_path, format="toy")
    data = open_some(tmp_path, format="toy", max_eval_queries=7)
    few, all_ = data.dev["dev"], whole.dev["dev"]
    assert len(few.query_ids) == len(few.query_texts) == len(few.qrels) == 7
    assert few.doc_texts == all_.doc_texts
    text = dict(zip(all_.query_ids, all_.query_texts, strict=True))
    assert [text[q] for q in few.query_ids] == few.query_texts
    assert len(data.test["test"].query_ids) == 60


def test_fewer_examples_are_a_seeded_choice(tmp_path):
    a, b, c = (open_some(tmp_path, format="toy", max_examples=50, seed=s).train for s in (0, 0, 1))
    chosen = [set(Batches(t, batch_size=99, seed=9).batch_at(0).example_ids[:]) for t in (a, b, c)]
    assert [len(x) for x in chosen] == [50, 50, 50]
    assert chosen[0] == chosen[1] != chosen[2]
    assert open_some(tmp_path, format="toy", max_examples=5000).train.num_examples == 480


# -- several sets -------------------------------------------------------------------------------


def test_sets_bring_their_own_prompts_weights_and_test_sets(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", pairs(60))
    sources = {
        "files": SourceConfig(root=str(path), weight=2.0, query_prompt="ask: "),
        "toy": SourceConfig(format="toy", passage_prompt=""),
    }
    spec = SimpleNamespace(
        **{**vars(SPEC), "query_prompt": "q: ", "passage_prompt": "p: ", "prompt_in_pooling": False}
    )
    data = open_some(tmp_path, spec, sets=sources, mix_temperature=2.0)
    assert list(data.dev) == list(data.test) == ["files", "toy"]
    assert [s.name for s in data.test.values()] == ["files", "toy"]
    assert data.prompts == {"files": ("ask: ", None), "toy": (None, "")}
    assert (
        data.report["train_examples"]
        == data.train.num_examples
        == 480 + sum(s.weight == 2.0 and len(s.query_E) for s in data.train.sets)
    )
    batch = Batches(data.train, batch_size=200, seed=0).batch_at(0)
    seen = Counter()
    for tokens, skip in zip(batch.query_tokens, batch.query_prompt_tokens_B, strict=True):
        prompt = "ask: " if read_back(tokens).startswith("ask: ") else "q: "
        assert read_back(tokens).startswith(prompt) and skip == len(prompt)
        seen[prompt] += 1
    assert set(seen) == {"ask: ", "q: "}
    for tokens, skip in zip(batch.passage_tokens, batch.passage_prompt_tokens_N, strict=True):
        assert skip == (3 if read_back(tokens).startswith("p: ") else 0)


def test_sets_that_would_share_a_name_are_refused(tmp_path):
    """One would silently take the other's place in the result."""
    for i in range(12):
        body = "\n".join(f"    v{j} = {i * j}" for j in range(12))
        source = f'def f{i}():\n    """Computes the value number {i}."""\n{body}\n'
        (tmp_path / f"mod{i}.py").write_text(source)
    sources = {
        "x": SourceConfig(format="pydocs", root=str(tmp_path)),
        "x-all": SourceConfig(format="toy"),
    }
    with pytest.raises(ValueError, match="two data sets would be reported as 'x-all'"):
        open_some(tmp_path, sets=sources)


@pytest.mark.parametrize("task", ["retrieval", "rerank"])
def test_what_one_set_trains_on_and_another_judges_is_reported(tmp_path, task, caplog):
    """Each set's own report is clean, and the test set of one is learnt by heart from the other."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(60)]
    write_rows(tmp_path / "all.jsonl", rows)
    part = tmp_path / "part"
    write_rows(part / "train.jsonl", pairs(20, "a"))
    write_rows(part / "dev.jsonl", pairs(20, "b"))
    own = [  # 5 rows of all.jsonl, 3 whose answer is there (one as a negative), 1 whose query is
        *rows[:5], {"query": "c", "positive": "p10"}, {"query": "d", "positive": "n11"},
        {"query": "e", "positive": " p10"}, {"query": "q15 ", "positive": "f"},
    ]  # fmt: skip
    write_rows(part / "test.jsonl", own)
    sets = {"a": SourceConfig(root=str(tmp_path / "all.jsonl")), "b": SourceConfig(root=str(part))}
    c = {"dev_fraction": 0.0, "test_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    found = reading.read_sets(DataConfig(sets=sets, **c), groups=task == "rerank")
    assert found.shared is not None
    shared = found.shared["pairs"]
    assert list(shared) == ["train of a/dev of b", "train of a/test of b"]
    leaks = shared["train of a/test of b"]
    assert (leaks["exact_queries"], leaks["exact_passages"]) == (6, 7)
    texts = {e["text"].strip() for e in leaks["examples"]}
    assert texts <= {f"{x}{i}" for x in "qp" for i in range(60)} | {"n11"} and len(texts) == 10
    assert shared["train of a/dev of b"] == {
        "exact_queries": 0, "exact_passages": 0, "examples": []
    }  # fmt: skip
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    line = "data.sets: train of a and test of b share 6 exact queries, 7 exact passages"
    assert any(w.startswith(line) for w in warned)
    report = found.report_of(SimpleNamespace(num_examples=80))
    fact = data_facts(report)["texts shared by data sets"]
    assert fact == "train of a and test of b: 6 exact queries, 7 exact passages"
    alone = reading.read_sets(DataConfig(root=str(part), **c), groups=task == "rerank")
    assert "leakage_between_sets" not in alone.report_of(SimpleNamespace(num_examples=20))


# -- the cache ----------------------------------------------------------------------------------


def test_a_second_run_reads_no_text_again(tmp_path, monkeypatch):
    """It starts from the cache: nothing is parsed or tokenised, batches and sets are equal."""
    path = write_rows(tmp_path / "pairs.jsonl", pairs(80))
    first = open_some(tmp_path, root=str(path))
    for name in ("read_examples", "split_examples", "leakage_report", "retrieval_set"):
        monkeypatch.setattr(reading, name, lambda *a, **k: pytest.fail("read again"))
    monkeypatch.setattr("data.tokens.tokenise", lambda *a: pytest.fail("tokenised again"))
    again = open_some(tmp_path, root=str(path))
    assert triples(again) == triples(first)
    assert (again.dev, again.test, again.report) == (first.dev, first.test, first.report)


def test_changed_text_or_settings_are_read_again(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", pairs(80))
    first = triples(open_some(tmp_path, root=str(path)))
    swapped = {"query": "positive", "positive": "query"}
    assert triples(open_some(tmp_path, root=str(path), columns=swapped)) != first
    path.write_text(path.read_text().replace("q1", "k1"))  # same length
    changed = triples(open_some(tmp_path, root=str(path)))
    assert changed != first and any(q.startswith("k1") for q, _, _ in changed)


@pytest.mark.parametrize("name", ["passages.bin", "positives.npy", "test.qrels.npy", "labels.bin"])
def test_a_damaged_index_is_built_again(tmp_path, name, caplog):
    path = write_rows(tmp_path / "pairs.jsonl", pairs(80))
    first = open_some(tmp_path, root=str(path))
    (folder,) = (tmp_path / "cache").glob("set-*/")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    again = open_some(tmp_path, root=str(path))
    assert triples(again) == triples(first) and again.test == first.test
    assert f"damaged ({name}" in caplog.text


def test_sets_over_one_corpus_store_it_once(tmp_path):
    judged = {
        s: [(i + 50 * n, i) for i in range(9)] for n, s in enumerate(("train", "dev", "test"))
    }
    open_some(tmp_path, root=str(beir(tmp_path / "beir", judged)))
    (folder,) = (tmp_path / "cache").glob("set-*/")
    assert [p.name for p in folder.glob("*.doc_texts.bin")] == ["dev.doc_texts.bin"]


def test_only_ids_of_a_beir_folder_are_shared_also_from_the_cache(tmp_path):
    """Searches leave out the document with the query's id where the ids are of one world."""
    numbered = [{"query_id": i, **row, "positive_id": i} for i, row in enumerate(pairs(40))]
    rows = write_rows(tmp_path / "rows.jsonl", numbered)
    judged = {s: [(i, i) for i in range(9)] for s in ("train", "dev", "test")}
    for root, is_shared in ((rows, False), (beir(tmp_path / "beir", judged), True)):
        for _ in range(2):
            data = open_some(tmp_path, root=str(root))
            found = [one.shares_ids for one in (data.dev["dev"], data.test["test"])]
            assert found == [is_shared] * 2


def test_files_that_no_reader_opens_do_not_change_the_data(tmp_path, monkeypatch):
    """data.root=. holds the run's own folders: its metrics would change its data as it runs."""
    monkeypatch.chdir(tmp_path)
    root = write_rows(Path("here") / "train.jsonl", pairs(80)).parent
    write_rows(root / "test.jsonl", pairs(5, "t"))
    first = open_some(tmp_path, root=str(root)).report["digest"]
    write_rows(root / "runs" / "default" / "metrics.jsonl", [{"step": 1}])
    write_rows(root / "notes.jsonl", [{"a": 1}])
    assert open_some(tmp_path, root=str(root)).report["digest"] == first
    write_rows(root / "test.jsonl", pairs(6, "t"))
    assert open_some(tmp_path, root=str(root)).report["digest"] != first


def test_judgements_behind_a_link_are_read_again_when_they_change(tmp_path):
    """A folder of qrels may be a link, which a walk over the files does not enter."""
    judged = {s: [(i, i) for i in range(9)] for s in ("train", "dev", "test")}
    root = beir(tmp_path / "beir", judged)
    (root / "qrels").rename(tmp_path / "real")
    (root / "qrels").symlink_to(tmp_path / "real")
    found = []
    for _ in range(2):
        found.append(open_some(tmp_path, root=str(root)).train.num_examples)
        path = tmp_path / "real" / "train.tsv"
        path.write_text("".join(path.read_text().splitlines(True)[:5]))
    assert found == [9, 4]


def test_a_hub_folder_that_changed_deep_down_is_read_again(tmp_path):
    """`datasets` reads any depth; a digest of the first two levels would serve the old rows."""
    pytest.importorskip("datasets", reason="the package datasets (extra [hub]) is missing")
    deep = tmp_path / "hub" / "en" / "train" / "x" / "train.jsonl"
    deep.parent.mkdir(parents=True)
    found = []
    for count in (60, 30):
        write_rows(deep, pairs(count))
        data = open_some(tmp_path, root=str(tmp_path / "hub"), format="hub", dev_fraction=0)
        found.append(data.train.num_examples + len(data.test["test"].query_ids))
    assert found == [60, 30]


class Hub:
    """A hub of one data set: commits by revision, rows of a commit by its letter."""

    def __init__(self, monkeypatch) -> None:
        self.commits, self.error, self.read = {None: "a" * 40, "v1": "b" * 40}, None, []
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        here = SimpleNamespace(
            get_dataset_split_names=lambda name, config, revision: ["train"], load_dataset=self.load
        )
        monkeypatch.setattr("data.tables._datasets", lambda: here)

    def dataset_info(self, name: str, revision: str | None) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(sha=self.commits[revision])

    def load(self, name: str, config: str, *, split: str, streaming: bool, revision: str):
        self.read.append(revision)

        class Rows(list):
            column_names, features = ("query", "positive"), None
            select_columns = lambda rows, names: rows  # noqa: E731

        return Rows(pairs(20, revision[0]))


def test_a_hub_data_set_is_read_at_its_revision_and_starts_without_a_network(
    tmp_path, monkeypatch, caplog
):
    """A branch moves; a name alone would train on other rows, and a cached set needs no hub."""
    hub = Hub(monkeypatch)
    some = {"root": "owner/name", "format": "hub"}

    def first_query(**settings) -> str:
        return open_some(tmp_path, **some, **settings).test["test"].query_texts[0]

    assert first_query()[0] == "a" and set(hub.read) == {"a" * 40}
    assert first_query(revision="v1")[0] == "b"
    assert first_query(revision="c" * 40)[0] == "c"
    hub.error, num_read = ConnectionError("no route"), len(hub.read)
    assert [first_query()[0], first_query(revision="v1")[0]] == ["a", "b"]
    assert (
        f"owner/name: the hub does not answer; taken from the cache as of {'a' * 40}" in caplog.text
    )
    assert first_query(revision="c" * 40)[0] == "c" and len(hub.read) == num_read
    for settings in ({"split_seed": 1}, {"revision": "v2"}):  # no index, or never asked for
        with pytest.raises(
            ValueError, match=r"hub does not answer for it \(ConnectionError: no rou"
        ):
            first_query(**settings)
    hub.error.response = SimpleNamespace(status_code=404)  # an answer: it is not there any more
    with pytest.raises(ValueError, match="hub does not answer for it"):
        first_query()
    hub.error = ConnectionError()
    (tmp_path / "cache" / "hub.json").write_text("[")
    with pytest.raises(ValueError, match="hub does not answer for it"):
        first_query()
    with pytest.raises(ValueError, match=r"data\.revision=v1 is of a data set of the hub"):
        open_some(tmp_path, root=str(tmp_path), format="hub", revision="v1")
    with pytest.raises(
        ValueError, match=r"data\.revision \(v1\) is of a hub data set, got data\.for"
    ):
        SourceConfig(root="x.jsonl", revision="v1")


def test_a_local_hub_folder_is_read_like_files(tmp_path):
    hub = pytest.importorskip("datasets", reason="the package datasets (extra [hub]) is missing")
    parts = {s: hub.Dataset.from_list(pairs(5, s[0])) for s in ("train", "validation", "test")}
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    data = open_some(tmp_path, root=str(tmp_path / "saved"), format="hub")
    assert triples(data) == {(f"tq{i}", (f"tp{i}",), ()): 1 for i in range(5)}
    assert data.dev["dev"].query_texts == [f"vq{i}" for i in range(5)]


# -- real text ----------------------------------------------------------------------------------


@pytest.mark.skipif(not DATASETS.exists(), reason="the text sets beside the project are absent")
def test_real_sets_agree_with_their_files(tmp_path, caplog):
    """Sizes counted from the raw files by other means."""
    caplog.set_level(logging.ERROR)
    root = DATASETS / "ray_docs"
    data = open_some(tmp_path, root=str(root))
    for split, size in (("train", 2724), ("dev", 424), ("test", 787)):
        lines = (root / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]
        queries = {line.split("\t")[0] for line in lines}
        assert len(queries) == size
        found = (
            {label.split(" ")[0] for label in data.train.sets[0].labels}
            if split == "train"
            else set({**data.dev, **data.test}[split].query_ids)
        )
        assert found == queries
    assert len(data.test["test"].doc_ids) == 4706
    shutil.rmtree(tmp_path / "cache")


def test_split_components_are_not_torn(tmp_path):
    """Recomputed from the sets themselves: every connected group lies in one split."""
    rows = [{"query": f"q{i % 40}", "positive": f"p{i * 7 % 65}"} for i in range(0, 90, 2)]
    data = open_some(tmp_path, root=str(write_rows(tmp_path / "pairs.jsonl", rows)))
    examples = []
    for split, sets in (("dev", data.dev), ("test", data.test)):
        for one in sets.values():
            examples += [(split, e) for e in reading._judged(one)]
    (folder,) = (tmp_path / "cache").glob("set-*/")
    examples += [("train", e) for e in stored_examples(folder)]
    row_E, text_E, num_rows = incidences(e for _, e in examples)
    keys = component_keys(row_E, text_E, num_rows=num_rows)
    splits: dict[int, set[str]] = {}
    for (split, _), key in zip(examples, keys.tolist(), strict=True):
        splits.setdefault(key, set()).add(split)
    assert all(len(s) == 1 for s in splits.values())
