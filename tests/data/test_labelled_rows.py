"""Labelled rows and rows of ids as groups: every layout, every file format, every fault."""

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import DataConfig, LossConfig, SourceConfig, TrainConfig
from data.formats import (
    BadRows,
    read_examples,
    read_groups,
    read_rerank_set,
    read_retrieval_set,
)

ROOT = Path(__file__).parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"

ROWS = [
    {"query": "what is rain", "passage": "water that falls", "label": 1},
    {"query": "what is rain", "passage": "a kind of bread", "label": 0},
    {"query": "what is rain", "passage": "drops from a cloud", "label": 2},
    {"query": "who was Ada", "passage": "a kind of bread", "label": 0},
    {"query": "where is Oslo", "passage": "a city in the north, \tcold", "label": 1},
]
GROUPS = [
    ("what is rain", {"water that falls": 1, "drops from a cloud": 2}, ["a kind of bread"]),
    ("who was Ada", {}, ["a kind of bread"]),
    ("where is Oslo", {"a city in the north, \tcold": 1}, []),
]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as JSONL, CSV or Parquet by the path's ending; TSV with tabs in texts as spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    else:
        is_tsv = path.suffix == ".tsv"
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, delimiter="\t" if is_tsv else ",", lineterminator="\n")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow(str(v).replace("\t", " ") if is_tsv else v for v in row.values())
    return path


def groups(path: Path, bad: BadRows | None = None, split: str | None = None, **settings) -> list:
    return list(read_groups(SourceConfig(root=str(path), **settings), split, bad))


def plain(examples: list) -> list:
    """(query, grade by positive, negatives), as GROUPS writes them."""
    return [
        (
            e.query,
            dict(zip(e.positives, e.positive_grades or [1] * len(e.positives), strict=True)),
            e.negatives,
        )
        for e in examples
    ]


def fault(path: Path, **settings) -> str:
    with pytest.raises(ValueError) as error:
        groups(path, **settings)
    return str(error.value)


def beir(root: Path, qrels: str = "") -> Path:
    """A BEIR folder with the texts of ROWS; ids q0, q1, q2 and d0 ... d3, the first with a title"""
    queries = list(dict.fromkeys(r["query"] for r in ROWS))
    docs = list(dict.fromkeys(r["passage"] for r in ROWS))
    write(root / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, q in enumerate(queries)])
    items = [{"_id": f"d{i}", "title": "", "text": d} for i, d in enumerate(docs)]
    first, _, rest = docs[0].partition(" ")
    items[0].update(title=first, text=rest)  # BEIR joins title and text
    write(root / "corpus.jsonl", items)
    if qrels:
        (root / "qrels").mkdir()
        (root / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    return root


def as_ids(rows: list[dict]) -> list[dict]:
    queries = list(dict.fromkeys(r["query"] for r in ROWS))
    docs = list(dict.fromkeys(r["passage"] for r in ROWS))
    return [
        {
            "query_id": f"q{queries.index(r['query'])}",
            "doc_id": f"d{docs.index(r['passage'])}",
            "label": r["label"],
        }
        for r in rows
    ]


# -- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "tsv"])
def test_labelled_rows_of_any_format_are_the_same_groups(tmp_path, ending):
    """Labels arrive as numbers or as text, and rows of a query must come together."""
    rows = ROWS if ending != "tsv" else [{**r, "passage": r["passage"].split(",")[0]} for r in ROWS]
    wanted = GROUPS
    if ending == "tsv":
        wanted = [*GROUPS[:2], ("where is Oslo", {"a city in the north": 1}, [])]
    assert plain(groups(write(tmp_path / f"rows.{ending}", rows))) == wanted


@pytest.mark.parametrize(
    "names",
    [("sentence1", "sentence2", "label"), ("question", "text", "relevance"),
     ("anchor", "positive", "grade"), ("Query", "doc", "Label")],
)  # fmt: skip
def test_usual_names_of_columns_are_understood(tmp_path, names):
    rows = [dict(zip(names, r.values(), strict=True)) for r in ROWS]
    assert plain(groups(write(tmp_path / "rows.jsonl", rows))) == GROUPS
    assert plain(groups(write(tmp_path / "rows.csv", rows))) == GROUPS


def test_other_names_are_given_by_the_mapping(tmp_path):
    rows = [{"a": r["query"], "b": r["passage"], "c": r["label"], "label": "x"} for r in ROWS]
    path = write(tmp_path / "rows.jsonl", rows)
    columns = {"query": "a", "passage": "b", "label": "c"}
    assert plain(groups(path, columns=columns)) == GROUPS
    columns["positive"] = columns.pop("passage")
    assert plain(groups(path, columns=columns)) == GROUPS


def test_lists_of_passages_and_labels_are_one_row_a_group(tmp_path):
    """The listwise layout of sentence-transformers."""
    rows = [
        {
            "query": q,
            "docs": [r["passage"] for r in ROWS if r["query"] == q],
            "labels": [r["label"] for r in ROWS if r["query"] == q],
            "scores": [r["label"] / 4 for r in ROWS if r["query"] == q],
        }
        for q, _, _ in GROUPS
    ]
    found = groups(write(tmp_path / "rows.jsonl", rows))
    assert plain(found) == GROUPS
    assert (found[0].positive_scores, found[0].negative_scores) == ([0.25, 0.5], [0.0])
    assert plain(groups(write(tmp_path / "rows.parquet", rows))) == GROUPS


def test_ids_stand_for_the_texts_of_a_beir_folder(tmp_path):
    texts = beir(tmp_path / "beir")
    path = write(tmp_path / "rows.jsonl", as_ids(ROWS))
    found = groups(path, texts=str(texts))
    assert plain(found) == GROUPS
    assert [e.id for e in found] == ["q0", "q1", "q2"]
    assert found[0].positive_ids == ["d0", "d2"] and found[0].negative_ids == ["d1"]
    assert plain(groups(write(tmp_path / "rows.tsv", as_ids(ROWS)), texts=str(texts))) == GROUPS


def test_a_query_may_be_text_and_its_passages_ids(tmp_path):
    """Natural negatives name a question that no queries.jsonl holds."""
    texts = beir(tmp_path / "beir")
    (texts / "queries.jsonl").unlink()
    rows = [{"query": "who was Ada", "doc_id": "d1", "label": 0}]
    found = groups(write(tmp_path / "rows.jsonl", rows), texts=str(texts))
    assert plain(found) == GROUPS[1:2]


def test_a_teachers_scores_come_beside_the_labels(tmp_path):
    rows = [{**r, "score": s} for r, s in zip(ROWS, [3.5, -2, None, -7.25, 1], strict=True)]
    found = groups(write(tmp_path / "rows.jsonl", rows))
    assert plain(found) == GROUPS
    assert (
        found[0].positive_scores[0] == 3.5
        and found[0].positive_scores[1] != (found[0].positive_scores[1])
    )  # NaN where the teacher says nothing
    assert found[0].negative_scores == [-2.0] and found[1].negative_scores == [-7.25]


def test_rows_of_positives_and_negatives_are_groups_too(tmp_path):
    """A positive score is a teacher's here, whatever its sign: the row says what is positive."""
    rows = [
        {"query": "a", "positive": ["p", "r"], "negatives": ["n", "m"],
         "positive_scores": [-1.5, 2], "negative_scores": [-9, -3], "positive_grades": [3, 1]},
        {"query": "b", "positive": "p", "negative": "m", "score": [0.5, -0.5]},
        {"query": "c", "positive": [], "negative": "p"},
        {"query": "d", "positive": "p", "score": -4},
    ]  # fmt: skip
    found = groups(write(tmp_path / "rows.jsonl", rows))
    assert plain(found) == [
        ("a", {"p": 3, "r": 1}, ["n", "m"]),
        ("b", {"p": 1}, ["m"]),
        ("c", {}, ["p"]),
        ("d", {"p": 1}, []),
    ]
    assert [e.positive_scores for e in found] == [[-1.5, 2.0], [0.5], None, [-4.0]]
    assert [e.negative_scores for e in found] == [[-9.0, -3.0], [-0.5], None, None]


def test_rows_of_one_query_side_by_side_are_one_group(tmp_path):
    rows = [{"query": "a", "positive": f"p{i}", "negative": f"n{i}"} for i in range(3)]
    found = groups(write(tmp_path / "rows.jsonl", rows))
    assert plain(found) == [("a", {"p0": 1, "p1": 1, "p2": 1}, ["n0", "n1", "n2"])]


def test_beir_judgements_are_grades_and_negatives(tmp_path):
    """Retrieval leaves documents judged 0 out; a reranker learns from them."""
    root = beir(tmp_path / "beir", "q0\td0\t2\nq0\td1\t0\nq1\td1\t-1\nq0\td2\t1\n")
    found = groups(root, split="test")
    assert plain(found) == [
        ("what is rain", {"water that falls": 2, "drops from a cloud": 1}, ["a kind of bread"]),
        ("who was Ada", {}, ["a kind of bread"]),
    ]
    assert [e.query for e in read_examples(SourceConfig(root=str(root)), "test")] == [
        "what is rain"
    ]


# -- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_id": "q9"}, "rows.jsonl:3: expected 'query_id' to be an id of"),
        ({"doc_id": "d99"}, "rows.jsonl:3: expected 'doc_id' to be an id of"),
        ({"doc_id": None}, "rows.jsonl:3: expected 'doc_id' to be an id, found null"),
        ({"label": "yes"}, "rows.jsonl:3: expected 1 finite numbers in 'label', one a passage"),
        ({"label": None}, "rows.jsonl:3: expected a number as label in 'label', found null"),
        ({"label": float("nan")}, "rows.jsonl:3: expected 1 finite numbers in 'label'"),
        ({"doc_id": "d0", "label": 0}, "rows.jsonl:3: expected one label a query and passage, as"),
    ],
)
def test_a_bad_row_of_ids_is_named(tmp_path, change, message):
    rows = as_ids(ROWS)
    rows[2] |= change
    path = write(tmp_path / "rows.jsonl", rows)
    texts = beir(tmp_path / "beir")
    assert message in fault(path, texts=str(texts))
    with BadRows("skip", tmp_path / "bad.jsonl") as bad:
        found = groups(path, bad, texts=str(texts))
    assert bad.count == 1 and "rows.jsonl:3" in bad.first
    assert plain(found)[0] == ("what is rain", {"water that falls": 1}, ["a kind of bread"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passage": None}, "rows.jsonl:2: expected a passage in passage, found none"),
        ({"passage": " "}, "rows.jsonl:2: expected 'passage' to hold text that is not empty"),
        ({"query": ""}, "rows.jsonl:2: expected 'query' to be text that is not empty"),
        ({"query": 5}, "rows.jsonl:2: expected 'query' to be text that is not empty, found the"),
        (
            {"passage": "water  that falls"},
            "rows.jsonl:2: expected one label a query and passage, as on line 1 (1), found label 0",
        ),
    ],
)
def test_a_bad_row_of_texts_is_named(tmp_path, change, message):
    """A pair is the same pair with other spaces: the passages are one text to training."""
    rows = [dict(r) for r in ROWS]
    rows[1] |= change
    assert message in fault(write(tmp_path / "rows.jsonl", rows))


def test_a_pair_with_one_label_may_come_twice(tmp_path):
    assert len(groups(write(tmp_path / "rows.jsonl", [*ROWS, *ROWS]))) == 6


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"query_id": "q0", "doc_id": "d0", "label": 1}, {}, "data.texts=<folder with corpus"),
        ({"query": "a", "passage": "b", "label": 1}, {"texts": "beir"}, "leave it out"),
        ({"query": "a", "positive": "b"}, {"texts": "beir"}, "a label column beside the ids"),
        ({"query": "a", "passage": "b", "score": 1}, {}, "data.columns={label: score}"),
        ({"query": "a", "positive": "b", "negative": "c", "label": 1}, {}, "negatives without"),
        ({"passage": "b", "label": 1}, {}, "expected a query column"),
        ({"query": "b", "label": 1}, {}, "expected a passage column"),
        ({"query": "a", "text": "b", "doc": "c", "label": 1}, {}, "one passage column"),
        ({"query": "a", "passage": "b", "label": 1}, {"columns": {"labl": "x"}}, "mean label"),
        ({"query_id": "a", "doc_id": "b", "label": 1}, {"texts": "nowhere"}, "expected a folder"),
    ],
)
def test_columns_that_cannot_be_told_are_an_error_with_the_remedy(tmp_path, row, settings, message):
    beir(tmp_path / "beir")
    if "texts" in settings:
        settings = {**settings, "texts": str(tmp_path / settings["texts"])}
    assert message in fault(write(tmp_path / "rows.jsonl", [row]), **settings)


def test_what_a_score_is_may_be_said(tmp_path):
    rows = [{"query": "a", "passage": "b", "score": 0}, {"query": "a", "passage": "c", "score": 2}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert plain(groups(path, columns={"label": "score"})) == [("a", {"c": 2}, ["b"])]
    scored = groups(path, columns={"score": "score"})
    assert plain(scored) == [("a", {"b": 1, "c": 1}, [])]
    assert scored[0].positive_scores == [0.0, 2.0]


def test_retrieval_refuses_what_only_a_reranker_can_use(tmp_path):
    """A retriever has nothing to pull a query towards where there is no positive."""
    path = write(tmp_path / "rows.jsonl", [{"query": "c", "positive": [], "negative": "p"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: expected a passage in positive"):
        list(read_examples(SourceConfig(root=str(path)), None))
    path = write(tmp_path / "labelled.jsonl", ROWS)
    with pytest.raises(ValueError, match="task=rerank"):
        list(read_examples(SourceConfig(root=str(path)), None))
    ids = write(tmp_path / "ids.jsonl", as_ids(ROWS))
    with pytest.raises(ValueError, match=r"data\.root=.*beir"):
        read_retrieval_set(SourceConfig(root=str(ids), texts=str(beir(tmp_path / "beir"))), None)


def test_texts_of_ids_that_nothing_would_read_are_refused():
    """Whatever the cache holds: where the rows were read before, the reader is not asked."""
    one, several = DataConfig(texts="t"), DataConfig(sets={"a": SourceConfig(texts="t")})
    for data, named in ((one, r"data\.texts=t"), (several, r"data\.sets\.a\.texts=t")):
        with pytest.raises(ValueError, match=f"{named} is for task=rerank"):
            TrainConfig(data=data)
        for kind, task in (("bce", "rerank"), ("kl", "retrieval"), ("margin_mse", "retrieval")):
            TrainConfig(data=data, task=task, loss=LossConfig(kind=kind))


# -- candidates ---------------------------------------------------------------------------------


def test_candidates_are_what_was_labelled(tmp_path):
    path = write(tmp_path / "test.jsonl", as_ids(ROWS))
    source = SourceConfig(root=str(path), texts=str(beir(tmp_path / "beir")))
    one = read_rerank_set(source, "test")
    assert one.query_ids == ["q0", "q2"]  # q1 has no positive: nothing to judge
    assert one.qrels == {"q0": {"d0": 1, "d2": 2}, "q2": {"d3": 1}}
    assert {q: set(c) for q, c in one.candidates.items()} == {
        "q0": {"d0", "d1", "d2"},
        "q2": {"d3"},
    }
    assert dict(zip(one.doc_ids, one.doc_texts, strict=True))["d0"] == "water that falls"


def test_the_order_of_candidates_says_nothing_about_labels(tmp_path):
    """Positives are read before negatives; made-up ids and orders must not show it to ties."""
    rng = random.Random(0)
    rows = [
        {"query": f"q{i}", "passage": f"text {rng.random()}", "label": int(k == 0)}
        for i in range(300)
        for k in range(5)
    ]
    one = read_rerank_set(SourceConfig(root=str(write(tmp_path / "a.jsonl", rows))), None)
    firsts = sum(one.candidates[q][0] in one.qrels[q] for q in one.query_ids)
    lowest = sum(
        min(c, key=lambda d: int(d[1:])) in one.qrels[q] for q, c in one.candidates.items()
    )
    # 60 of 300 expected by chance, standard deviation 7
    assert 35 < firsts < 85 and 35 < lowest < 85
    for r in rows:
        r["label"] = 1 - r["label"]
    other = read_rerank_set(SourceConfig(root=str(write(tmp_path / "b.jsonl", rows))), None)
    assert other.candidates == one.candidates and other.doc_texts == one.doc_texts


def test_a_label_between_whole_ones_is_judged_as_the_nearest(tmp_path, caplog):
    """Soft labels of .05 and .95 are not two relevant passages."""
    rows = [
        {"query": "q", "passage": f"text {label}", "label": label}
        for label in (0.05, 0.4, 0.5, 0.95, 1.6, 0)
    ]
    one = read_rerank_set(SourceConfig(root=str(write(tmp_path / "a.jsonl", rows))), None)
    text = dict(zip(one.doc_ids, one.doc_texts, strict=True))
    (judged,) = one.qrels.values()
    assert {text[d]: g for d, g in judged.items()} == {"text 0.5": 1, "text 0.95": 1, "text 1.6": 2}
    assert len(one.candidates[one.query_ids[0]]) == 6
    assert "5 labels are not whole numbers" in caplog.text


def test_rows_of_a_query_need_not_be_neighbours(tmp_path):
    rows = list(ROWS)
    random.Random(1).shuffle(rows)
    one = read_rerank_set(SourceConfig(root=str(write(tmp_path / "a.jsonl", rows))), None)
    assert sorted(one.query_texts) == ["what is rain", "where is Oslo"]
    text = dict(zip(one.doc_ids, one.doc_texts, strict=True))
    found = {
        one.query_texts[i]: {text[d]: one.qrels[q].get(d, 0) for d in one.candidates[q]}
        for i, q in enumerate(one.query_ids)
    }
    assert found["what is rain"] == {r["passage"]: r["label"] for r in ROWS[:3]}


def test_without_a_negative_candidates_come_from_a_first_stage(tmp_path):
    """A query whose every candidate is a positive has MRR 1 whatever the model."""
    rows = [r for r in ROWS if r["label"]]
    one = read_rerank_set(SourceConfig(root=str(write(tmp_path / "a.jsonl", rows))), None)
    assert one.candidates is None and len(one.doc_ids) == 3
    root = beir(tmp_path / "beir", "q0\td0\t1\n")
    assert read_rerank_set(SourceConfig(root=str(root)), "test").candidates is None


def test_equal_texts_with_ids_of_their_own_stay_apart(tmp_path):
    """Two queries of a test set may read the same; each has its own judgements."""
    texts = tmp_path / "beir"
    write(texts / "queries.jsonl", [{"_id": q, "text": "same"} for q in ("a", "b")])
    write(texts / "corpus.jsonl", [{"_id": d, "text": "equal"} for d in ("x", "y")])
    rows = [
        {"query_id": "a", "doc_id": "x", "label": 1},
        {"query_id": "a", "doc_id": "y", "label": 0},
        {"query_id": "b", "doc_id": "y", "label": 1},
    ]
    source = SourceConfig(root=str(write(tmp_path / "a.jsonl", rows)), texts=str(texts))
    one = read_rerank_set(source, None)
    assert one.qrels == {"a": {"x": 1}, "b": {"y": 1}}
    assert {q: sorted(c) for q, c in one.candidates.items()} == {"a": ["x", "y"], "b": ["y"]}


@pytest.mark.skipif(not DATASETS.is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize(("split", "num"), [("dev", 195), ("test", 694)])
def test_ar_rerank_has_the_candidates_of_its_files(split, num):
    """Against the rows read with json alone, and the MRR that chance gives (.285 on test)."""
    root = DATASETS / "ar_rerank"
    texts = DATASETS / "ar_arcd_aqad"
    one = read_rerank_set(SourceConfig(root=str(root), texts=str(texts)), split)
    labels: dict[str, dict[str, int]] = {}
    for row in map(json.loads, open(root / f"{split}.jsonl")):
        labels.setdefault(row["query_id"], {})[row["doc_id"]] = row["label"]
    assert len(one.query_ids) == num
    assert one.query_ids == list(labels)
    for q, judged in labels.items():
        assert set(one.candidates[q]) == set(judged) and len(one.candidates[q]) == len(judged)
        assert one.qrels[q] == {d: 1 for d, x in judged.items() if x}
    corpus = {}
    for row in map(json.loads, open(texts / "corpus.jsonl")):
        corpus[row["_id"]] = f"{row['title']} {row['text']}".strip()
    for d, t in zip(one.doc_ids, one.doc_texts, strict=True):
        assert corpus[d] == t
    rng = random.Random(0)
    ranks = []
    for _ in range(20):
        for q, judged in labels.items():
            order = rng.sample(one.candidates[q], len(judged))
            ranks.append(1 / (1 + next(i for i, d in enumerate(order) if d in one.qrels[q])))
    # standard error of 20 x 195 draws: .3 / 62
    assert abs(sum(ranks) / len(ranks) - 0.285) < 0.02
