"""Every layout of text data reads to the same examples; every fault is named with file and line."""

import csv
import gzip
import io
import json
import logging
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from conf.schema import SourceConfig
from data.formats import (
    BadRows,
    Example,
    available_splits,
    content_hash,
    detect,
    normalise,
    read_beir,
    read_examples,
    read_groups,
    read_retrieval_set,
    tell_files,
)
from data.records import HashIndex

ROOT = Path(__file__).parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"
needs_sets = pytest.mark.skipif(not DATASETS.is_dir(), reason="no ../shared/datasets here")


def source(root: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(root=str(root), **settings)


def read(root: Path | str, split: str | None = None, **settings: Any) -> list[Example]:
    return list(read_examples(source(root, **settings), split))


def texts(examples: list[Example]) -> list[tuple[str, list[str], list[str]]]:
    return [(e.query, e.positives, e.negatives) for e in examples]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def write_beir(root: Path, *, qrels: str | None = None) -> Path:
    docs = [
        {"_id": "d1", "title": "Cat", "text": "A small animal."},
        {"_id": "d2", "title": "", "text": "No title here."},
        {"_id": "d3", "text": "No title field."},
        {"_id": 4, "title": "Only a title", "text": ""},
    ]
    write_jsonl(root / "corpus.jsonl", docs)
    write_jsonl(
        root / "queries.jsonl", [{"_id": q, "text": f"text of {q}"} for q in ("q2", "q1", "q3")]
    )
    default = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1\nq1\td3\t0\nq1\t4\t1\nq3\td1\t0\n"
    (root / "qrels").mkdir()
    (root / "qrels" / "test.tsv").write_text(qrels if qrels is not None else default, "utf-8")
    return root


# -- BEIR ---------------------------------------------------------------------------------------


def test_beir_folder_gives_titles_joined_grades_and_judged_queries(tmp_path: Path) -> None:
    """Title joining decides scores; a 0 in the qrels is a judgement, not a positive."""
    root = write_beir(tmp_path)
    assert detect(root) == "beir" and available_splits(source(root)) == ["test"]
    found = read_retrieval_set(source(root), "test", name="toy")
    assert found.name == "toy" and found.doc_ids == ["d1", "d2", "d3", "4"]
    assert found.doc_texts == [
        "Cat A small animal.",
        "No title here.",
        "No title field.",
        "Only a title",
    ]
    assert found.query_ids == ["q2", "q1", "q3"] and found.query_texts[1] == "text of q1"
    assert found.qrels == {"q1": {"d1": 2, "d3": 0, "4": 1}, "q2": {"d2": 1}, "q3": {"d1": 0}}

    one, two = read(root, "test")  # q3 has no relevant document
    assert (one.id, one.positive_ids, one.positive_scores) == ("q1", ["d1", "4"], [2.0, 1.0])
    assert one.positives == ["Cat A small animal.", "Only a title"] and one.negatives == []
    assert one.where == f"{root}/qrels/test.tsv:2"
    assert (two.id, two.positives, two.positive_scores) == ("q2", ["No title here."], None)


def test_beir_qrels_without_header_and_gzip_parts_read_the_same(tmp_path: Path) -> None:
    """A header guess that eats the first row loses one judgement in silence."""
    plain = write_beir(
        tmp_path / "plain", qrels="query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n"
    )
    bare = write_beir(tmp_path / "bare", qrels="q1\td1\t1\nq2\td2\t1\n")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (bare / f"{name}.gz").write_bytes(gzip.compress((bare / name).read_bytes()))
        (bare / name).unlink()
    assert read_beir(plain, "test").qrels == read_beir(bare, "test").qrels
    assert texts(read(plain, "test")) == texts(read(bare, "test")) and len(read(bare, "test")) == 2


@needs_sets
@pytest.mark.parametrize("name", ["ray_docs", "en_fever", "tr_thquad", "en_scifact", "en_npl"])
def test_real_beir_sets_read_as_a_dict_join_does(name: str) -> None:
    """Offsets, grouping and order are ours; the plain way holds everything in dicts."""
    folder = DATASETS / name
    docs = {
        d["_id"]: (d["title"] + " " + d["text"]).strip() for d in _objects(folder / "corpus.jsonl")
    }
    queries = {q["_id"]: q["text"] for q in _objects(folder / "queries.jsonl")}
    wanted: dict[str, dict[str, int]] = {}
    with open(folder / "qrels" / "test.tsv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            wanted.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    found = read_retrieval_set(source(folder), "test")
    assert dict(zip(found.doc_ids, found.doc_texts, strict=True)) == docs
    assert found.qrels == wanted
    assert dict(zip(found.query_ids, found.query_texts, strict=True)) == {
        q: queries[q] for q in wanted
    }
    examples = read(folder, "test")
    assert [e.id for e in examples] == list(wanted)
    assert all(e.query == queries[e.id] for e in examples)
    assert all(e.positives == [docs[d] for d in wanted[e.id]] for e in examples)


@needs_sets
def test_real_set_statistics_agree_with_their_notes() -> None:
    """Counts written by whoever built the sets, in every language."""
    for name in ("ar_arcd_aqad", "fa_pquad", "fa_farstail", "ray_docs", "en_fever"):
        stats = json.loads((DATASETS / name / "stats.json").read_text("utf-8"))
        for split, count in stats["queries"].items():
            examples = read(DATASETS / name, split)
            assert len(examples) == count
            assert sum(len(e.positives) for e in examples) == stats["qrels"][split]


@needs_sets
def test_real_triplets_beside_a_beir_folder_are_read_when_asked_for() -> None:
    """fa_farstail holds both; data.format=jsonl must not take corpus.jsonl for rows."""
    folder = DATASETS / "fa_farstail"
    rows = list(_objects(folder / "train.jsonl"))
    wanted = [(r["query"], [r["positive"]], r["negatives"]) for r in rows]
    assert texts(read(folder, "train", format="jsonl")) == wanted
    assert texts(read(folder / "train.jsonl")) == wanted
    assert available_splits(source(folder, format="jsonl")) == ["train", "dev", "test"]


def _objects(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# -- rows ---------------------------------------------------------------------------------------

WANTED = [("what is a cat?", ["an animal", "a pet"], ["a car"]), ("o\u00f9?", ["ici"], [])]


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"query": "what is a cat?", "positive": ["an animal", "a pet"], "negative": "a car"},
            {"query": "o\u00f9?", "positive": "ici"},
        ],
        [
            {
                "query": "what is a cat?",
                "pos": ["an animal", "a pet"],
                "neg": ["a car"],
                "prompt": "p",
            },
            {"query": "o\u00f9?", "pos": ["ici"], "neg": []},
        ],
        [
            {
                "query_id": "1",
                "query": "what is a cat?",
                "positive_passages": [
                    {"docid": "7", "title": "an", "text": "animal"},
                    {"docid": "8", "title": "", "text": "a pet"},
                ],
                "negative_passages": [{"docid": "9", "title": "a", "text": "car"}],
            },
            {
                "query_id": "2",
                "query": "o\u00f9?",
                "positive_passages": [{"docid": "3", "text": "ici"}],
                "negative_passages": [],
            },
        ],
        [
            {
                "anchor": "what is a cat?",
                "positive_1": "an animal",
                "positive_2": "a pet",
                "negative_1": "a car",
            },
            {"anchor": "o\u00f9?", "positive_1": "ici", "positive_2": None, "negative_1": None},
        ],
    ],
    ids=["plain", "FlagEmbedding", "Tevatron", "sentence-transformers"],
)
def test_known_layouts_read_to_the_same_examples(tmp_path: Path, rows: list[Any]) -> None:
    """Each reference system names and nests its fields in another way; JSONL and Parquet alike."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_jsonl(tmp_path / "a" / "rows.jsonl", rows)
    assert texts(read(path)) == WANTED
    if not isinstance(rows[0].get("positive"), list):  # Parquet columns have one type
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        assert detect(tmp_path / "rows.parquet") == "parquet"
        assert texts(read(tmp_path / "rows.parquet")) == WANTED


def test_ids_and_scores_arrive_beside_their_texts(tmp_path: Path) -> None:
    """Teacher scores attached to the wrong passage would train silently wrong."""
    row = {
        "query": "q",
        "pos": ["a", "b"],
        "neg": ["c"],
        "pos_scores": [1.5, 2],
        "neg_scores": [-3.0],
    }
    flag = read(write_jsonl(tmp_path / "flag.jsonl", [row]))[0]
    assert (flag.positive_scores, flag.negative_scores) == ([1.5, 2.0], [-3.0])
    assert flag.id == flag.where == f"{tmp_path}/flag.jsonl:1"
    passage = {"docid": 12, "title": "T", "text": "x"}
    row = {
        "query_id": 5,
        "query": "q",
        "positive_passages": [passage],
        "negative_passages": [passage],
    }
    tevatron = read(write_jsonl(tmp_path / "tev.jsonl", [row]))[0]
    assert (tevatron.id, tevatron.positive_ids, tevatron.negative_ids) == ("5", ["12"], ["12"])


def test_csv_fields_of_several_lines_keep_text_and_first_line(tmp_path: Path) -> None:
    """Quoted fields may hold commas, quotes and line ends; against the csv module and pandas."""
    pandas = pytest.importorskip("pandas")
    rng = random.Random(0)
    pieces = ["a", ",", '"', "\n", "\r\n", " b", "\t", "\u00e9", "'"]
    rows = [
        [f"q{i} " + "".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(3)]
        for i in range(200)
    ]
    path = tmp_path / "rows.csv"
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["query", "positive", "negative"], *rows])
    examples = read(path)
    assert [[e.query, *e.positives, *e.negatives] for e in examples] == rows
    frame = pandas.read_csv(path, keep_default_na=False)
    assert [e.query for e in examples] == [q.replace("\r\n", "\n") for q in frame["query"]] or [
        e.query for e in examples
    ] == list(frame["query"])
    text = path.read_bytes().decode()
    for e in examples[::20]:
        line = int(e.where.rsplit(":", 1)[1])
        start = len("".join(text.splitlines(keepends=True)[: line - 1]))
        assert next(csv.reader(io.StringIO(text[start:], newline="")))[0] == e.query


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    """A reader that honours quotes swallows rows after a lone quotation mark."""
    path = tmp_path / "rows.tsv"
    path.write_text('"query one\tits answer"\nan "inner" quote\tsecond\n', "utf-8")
    assert texts(read(path)) == [
        ('"query one', ['its answer"'], []),
        ('an "inner" quote', ["second"], []),
    ]


def test_tsv_fields_that_only_csv_writes_are_unquoted(tmp_path: Path) -> None:
    """pandas' to_csv(sep="\\t") quotes a field that holds a quote, and doubles that."""
    plain = ['he said "yes"', '"no"', 'a "" b', "plain", '"', 'x"', '""', 'a "b", "c"']
    with open(tmp_path / "csv.tsv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerows([["query", "positive"], *([p, p] for p in plain)])
    assert texts(read(tmp_path / "csv.tsv")) == [(p, [p], []) for p in plain]
    kept = ['"a whole sentence."', '""', '"one" and "two"', '""word""', '"a ""b" c"', '"', 'a ""']
    path = tmp_path / "kept.tsv"
    path.write_text("query\tpositive\n" + "".join(f"{k}\t{k}\n" for k in kept), "utf-8")
    assert texts(read(path)) == [(k, [k], []) for k in kept]


def test_tsv_with_and_without_header_read_the_same(tmp_path: Path) -> None:
    """The header must be neither lost nor an example; empty negative cells are no negatives."""
    body = "what is it?\tthat\ta b\tc d\nwho is she?\tAnn\te f\t\n"
    (tmp_path / "bare.tsv").write_text(body, "utf-8")
    (tmp_path / "head.tsv").write_text("anchor\tpositive\tnegative_1\tnegative_2\n" + body, "utf-8")
    wanted = [("what is it?", ["that"], ["a b", "c d"]), ("who is she?", ["Ann"], ["e f"])]
    assert texts(read(tmp_path / "bare.tsv")) == texts(read(tmp_path / "head.tsv")) == wanted


def test_columns_by_number_serve_a_file_without_header(tmp_path: Path) -> None:
    """MS MARCO style files have ids between the texts."""
    path = tmp_path / "rows.tsv"
    path.write_text("1\tfirst?\t9\tanswer one\n2\tsecond?\t8\tanswer two\n", "utf-8")
    columns = {"query": "1", "positive": "3", "id": "0", "positive_id": "2"}
    examples = read(path, columns=columns)
    assert texts(examples) == [("first?", ["answer one"], []), ("second?", ["answer two"], [])]
    assert [(e.id, e.positive_ids) for e in examples] == [("1", ["9"]), ("2", ["8"])]


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv", "parquet", "hub"])
def test_mapping_and_filter_hold_in_every_format(tmp_path: Path, kind: str) -> None:
    """nli_fever: premise is the query, label 0 is entailment; others are false positives."""
    rows = [{"premise": f"claim {i}", "hypothesis": f"text {i}", "label": i % 3} for i in range(9)]
    path = tmp_path / f"rows.{kind}"
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(rows)
        data = data.cast_column(
            "label", datasets.ClassLabel(names=["entails", "neutral", "contradicts"])
        )
        datasets.DatasetDict({"train": data, "validation": data.select([0])}).save_to_disk(path)
    else:
        _write(path, rows, kind)
    mapping = {"query": "premise", "positive": "hypothesis"}
    wanted = [(f"claim {i}", [f"text {i}"], []) for i in (0, 3, 6)]
    split = "train" if kind == "hub" else None
    assert texts(read(path, split, columns=mapping, filter={"label": 0})) == wanted
    assert len(read(path, split, columns=mapping, filter={"label": [0, 1]})) == 6
    if kind == "hub":
        assert detect(path) == "hub" and available_splits(source(path)) == ["train", "validation"]
        assert texts(read(path, "train", columns=mapping, filter={"label": "entails"})) == wanted
        assert len(read(path, "dev", columns=mapping, filter={"label": 0})) == 1
        with pytest.raises(ValueError, match=r"names no class of .*entails, neutral, contradicts"):
            read(path, "train", columns=mapping, filter={"label": "yes"})
    with pytest.raises(
        ValueError, match=r"'theirs' \(data.columns.positive\), found columns premise, hypo"
    ):
        read(path, split, columns={"query": "premise", "positive": "theirs"})
    with pytest.raises(
        ValueError, match=r"a column 'lable' \(data.filter\), found columns premise, hypo"
    ):
        read(path, split, columns=mapping, filter={"lable": 0})
    with pytest.raises(ValueError, match=r"keeps none of 9 rows; seen: label=.*1.*2"):
        read(path, split, columns=mapping, filter={"label": 7})


def _write(path: Path, rows: list[dict[str, Any]], kind: str) -> None:
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
            writer.writerows([list(rows[0]), *(list(r.values()) for r in rows)])


def test_hub_format_reads_a_local_folder_of_parquet(tmp_path: Path, monkeypatch: Any) -> None:
    """The hub path streams through load_dataset, which must work without a network."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(5)]
    folder = tmp_path / "set"
    folder.mkdir()
    _write(folder / "train-00000-of-00001.parquet", rows, "parquet")
    _write(folder / "test-00000-of-00001.parquet", rows[:2], "parquet")
    hub = source(folder, format="hub")
    assert sorted(available_splits(hub)) == ["test", "train"]
    wanted = [(r["query"], [r["positive"]], []) for r in rows]
    assert texts(list(read_examples(hub, "train"))) == wanted == texts(read(folder, "train"))


def test_missing_datasets_package_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    """[hub] is an extra: without it the user must learn what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install -e '.\[hub\]'"):
        read("owner/name", "train", format="hub")


def test_splits_come_from_file_names_shards_and_usual_aliases(tmp_path: Path) -> None:
    """dev must find validation.*, and shards are one split in order."""
    for name, word in (("train-00001-of-00002", "b"), ("train-00000-of-00002", "a")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"query": word, "positive": word}])
    (tmp_path / "validation.tsv").write_text("query\tpositive\nv\tw\n", "utf-8")
    (tmp_path / "test.csv.gz").write_bytes(gzip.compress(b"query,positive\nt,u\n"))
    (tmp_path / "stats.json").write_text("{}", "utf-8")
    (tmp_path / "README.md").write_text("notes", "utf-8")
    assert available_splits(source(tmp_path)) == ["train", "validation", "test"]
    assert [e.query for e in read(tmp_path, "train")] == ["a", "b"]
    assert texts(read(tmp_path, "dev")) == [("v", ["w"], [])]
    assert texts(read(tmp_path, "test")) == [("t", ["u"], [])]
    with pytest.raises(
        ValueError, match="no split 'extra'; splits at hand: train, validation, test"
    ):
        read(tmp_path, "extra")
    with pytest.raises(ValueError, match="has splits train, validation, test; name one"):
        read(tmp_path)


@pytest.mark.parametrize("form", ["squad_{}", "{}_v2", "my.{}", "A-{}-0001", "{}-a-00000-of-00001"])
def test_a_split_may_be_a_word_of_the_file_name(tmp_path: Path, form: str, caplog) -> None:
    """Otherwise squad_test.jsonl is trained on."""
    for name in ("Train", "validation", "test"):
        path = tmp_path / f"{form.format(name)}.jsonl"
        write_jsonl(path, [{"query": name, "positive": name}])
    write_jsonl(tmp_path / "testimony.jsonl", [{"query": "other", "positive": "other"}])
    assert available_splits(source(tmp_path)) == ["train", "dev", "test", "testimony"]
    tell_files(source(tmp_path), ["train"])
    assert "not read: testimony.jsonl; put train, dev or test into the name" in caplog.text
    for split, word in (("train", "Train"), ("validation", "validation"), ("test", "test")):
        assert [e.query for e in read(tmp_path, split)] == [word]
    write_jsonl(tmp_path / "nq_train.jsonl", [{"query": "more", "positive": "more"}])
    assert {e.query for e in read(tmp_path, "train")} == {"Train", "more"}
    write_jsonl(tmp_path / "train.jsonl", [{"query": "exact", "positive": "exact"}])
    assert [e.query for e in read(tmp_path, "train")] == ["exact"]


@pytest.mark.parametrize("names", [("a", "b"), ("train_test", "test_b"), ("a_test", "b")])
def test_names_that_tell_no_splits_are_one_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_jsonl(tmp_path / f"{name}.jsonl", [{"query": name, "positive": name}])
    assert available_splits(source(tmp_path)) == []
    assert {e.query for e in read(tmp_path)} == set(names)


def test_a_lone_file_has_no_splits_unless_it_is_the_one_asked_for(tmp_path: Path) -> None:
    """Reading pairs.jsonl as "test" would evaluate on training rows."""
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "positive": "b"}])
    assert available_splits(source(path)) == [] == available_splits(source(tmp_path))
    assert len(read(path)) == len(read(tmp_path)) == 1
    with pytest.raises(ValueError, match="no splits of its own, so there is no 'test'"):
        read(path, "test")
    path.rename(tmp_path / "test.jsonl")
    assert len(read(tmp_path / "test.jsonl", "test")) == 1


def test_bom_crlf_and_blank_last_lines_are_no_faults(tmp_path: Path) -> None:
    """Files from Windows carry all three."""
    for name, text in (
        ("a.jsonl", '{"query": "q", "positive": "p"}\n{"query": "r", "positive": "s"}\n\n\n'),
        ("b.tsv", "query\tpositive\nq\tp\nr\ts\n\n"),
        ("c.csv", "query,positive\nq,p\nr,s\n\n"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert texts(read(tmp_path / name)) == [("q", ["p"], []), ("r", ["s"], [])]


def test_formats_are_told_by_content_where_names_say_nothing_or_wrong(tmp_path: Path) -> None:
    """A .txt of JSON objects, a .csv with tabs: the content is unambiguous."""
    for name, text, wanted in (
        ("a.txt", '{"query": "q", "positive": "p"}\n', "jsonl"),
        ("b.txt", "a question?\tan answer\n", "tsv"),
        ("c.csv", "query\tpositive\nq\tp\n", "tsv"),
        ("d.tsv", "query,positive\nq,p\n", "csv"),
        ("e.json", '{"query": "q", "positive": "p"}\n', "jsonl"),
    ):
        (tmp_path / name).write_text(text, "utf-8")
        assert detect(tmp_path / name) == wanted
        assert len(read(tmp_path / name)) == 1
    (tmp_path / "f.txt").write_text("some, prose\n", "utf-8")
    with pytest.raises(ValueError, match=r"cannot tell the format .* set data.format="):
        detect(tmp_path / "f.txt")


def test_label_column_is_never_guessed(tmp_path: Path) -> None:
    """label 0 is "contradiction" in one set, "entailment" in another: a guess trains wrong."""
    rows = [{"query": f"q{i}", "passage": f"p{i}", "label": i} for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"told what column 'label' is: data.filter=.*found columns query"
    ):
        read(path)
    assert [e.query for e in read(path, columns={"score": "label"})] == ["q1", "q2"]
    assert [e.query for e in read(path, filter={"label": 0})] == ["q0"]
    assert len(read(path, columns={"score": ""})) == 3


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv", "rows.csv", "rows", "rows.csv.gz"])
def test_utf16_is_no_single_bad_row(tmp_path: Path, name: str, on_bad_row: str) -> None:
    """Every other line of it, read as bytes, is UTF-8 with a NUL after each letter."""
    kind = name.removesuffix(".gz").partition(".")[2] or "tsv"
    for encoding in ("utf-16-le", "utf-16-be"):
        data = "\ufeffquery\tpositive\nq\tp\nr\ts\n".encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        for settings in ({}, {"format": kind}):
            with pytest.raises(
                ValueError, match="found a UTF-16 byte order mark; save the file as"
            ):
                examples = read_examples(
                    source(tmp_path / name, **settings), None, BadRows(on_bad_row)
                )
                list(examples)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", ["Label", "labels", "LABELS"])
def test_a_label_of_any_spelling_must_be_told(tmp_path: Path, kind: str, name: str) -> None:
    """A column that is passed over trains on the pairs that it calls irrelevant."""
    path = tmp_path / f"rows.{kind}"
    _write(path, [{"query": f"q{i}", "passage": f"p{i}", name: i % 2} for i in range(4)], kind)
    with pytest.raises(ValueError, match=f"told what column '{name}' is: data.filter={{{name}: "):
        read(path)
    assert [e.query for e in read(path, columns={"score": name})] == ["q1", "q3"]
    assert len(read(path, columns={"score": ""})) == 4
    groups = list(read_groups(source(path, columns={"label": "", "score": ""}), None))
    assert len(groups) == 4


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_columns_that_are_not_used_are_in_the_log(tmp_path: Path, kind: str, caplog: Any) -> None:
    path = tmp_path / f"rows.{kind}"
    _write(path, [{"query": "q", "positive": "p", "lang": "en", "split": "a"}], kind)
    caplog.set_level(logging.INFO)
    read(path, filter={"split": "a"})
    assert "columns not used: lang" in caplog.text and "split" not in caplog.messages[-1]


def test_pair_files_make_a_retrieval_set_of_distinct_texts(tmp_path: Path) -> None:
    """A passage of two rows is one document; a score of 0 is a judgement, never a positive."""
    rows = [
        {"query": "a", "positive": "one", "score": 2},
        {"query": "a ", "positive": "two", "score": 0},
        {"query": "b", "positive": " one", "score": 1},
        {"query": "b", "positive": "three", "score": 0.5},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = read_retrieval_set(source(path), None)
    assert (found.name, found.doc_ids, found.doc_texts) == (
        "rows.jsonl",
        ["d0", "d1", "d2"],
        ["one", "two", "three"],
    )
    assert found.query_texts == ["a", "b"]
    assert found.qrels == {"q0": {"d0": 2, "d1": 0}, "q1": {"d0": 1, "d2": 1}}
    assert [e.query for e in read(path)] == ["a", "b", "b"]

    passages = [{"docid": "d1", "text": "given"}, {"docid": "x", "text": "more"}]
    row = {"query_id": "7", "query": "a", "positive_passages": passages, "negative_passages": []}
    plain = {"query": "b", "positive": "p", "negative": ["n", "given"]}
    found = read_retrieval_set(source(write_jsonl(tmp_path / "ids.jsonl", [row, plain])), None)
    assert found.doc_ids == ["d1", "x", "d2", "d3"] and found.query_ids == ["7", "q1"]
    assert found.qrels == {"7": {"d1": 1, "x": 1}, "q1": {"d2": 1}}


def test_a_query_without_a_relevant_passage_is_not_judged(tmp_path: Path, caplog) -> None:
    """It would count 0 in every metric whatever the model does, as it does not where rows are held
    out of training or put in order by a reranker. Its passage is still searched."""
    rows = [{"query": q, "positive": f"on {q}", "score": n} for q, n in (("a", 0), ("b", 1))]
    with caplog.at_level(logging.INFO):
        found = read_retrieval_set(source(write_jsonl(tmp_path / "test.jsonl", rows)), None)
    assert found.query_ids == ["q1"] and found.query_texts == ["b"]
    assert found.doc_texts == ["on a", "on b"] and found.qrels == {"q1": {"d1": 1}}
    assert "left out 1 queries without a positive" in caplog.text
    assert [e.query for e in read(tmp_path / "test.jsonl")] == found.query_texts
    with pytest.raises(ValueError, match=r"none.jsonl: no query has a relevant passage"):
        read_retrieval_set(source(write_jsonl(tmp_path / "none.jsonl", rows[:1])), None)


# -- faults -------------------------------------------------------------------------------------

GOOD = '{"query": "q", "positive": "p"}'
FAULTS = {
    "not JSON": ('{"query": "q", }', r"expected a JSON object, found .*column"),
    "cut off": ('{"query": "q", "pos', "expected a JSON object"),
    "array": ('["q", "p"]', "write one object a line|expected a JSON object, found a list"),
    "deep": ("[" * 100_000, "expected a JSON object"),
    "huge number": ('{"query": ' + "9" * 5000 + "}", "expected a JSON object"),
    "missing query": ('{"positive": "p"}', "expected a query column .*found columns positive"),
    "missing positive": ('{"query": "q"}', "expected a positive column .*found columns query"),
    "empty query": ('{"query": "  ", "positive": "p"}', "'query' to be text .*found empty text"),
    "empty positive": (
        '{"query": "q", "positive": ""}',
        "'positive' to hold text .*found empty text",
    ),
    "empty list": ('{"query": "q", "positive": []}', "expected a passage in positive, found none"),
    "empty negative": (
        '{"query": "q", "positive": "p", "negative": [""]}',
        "'negative' to hold .*empty",
    ),
    "number": ('{"query": 7, "positive": "p"}', "'query' to be text .*found the number 7"),
    "null": ('{"query": null, "positive": "p"}', "'query' to be text .*found null"),
    "nested": ('{"query": "q", "positive": [["p"]]}', "'positive' to hold text .*found a list"),
    "object": (
        '{"query": "q", "positive": {"body": "p"}}',
        "with a field 'text', found fields body",
    ),
    "surrogate": ('{"query": "\\ud800", "positive": "p"}', "half of a surrogate pair"),
    "scores": (
        '{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}',
        "1 finite numbers in 'pos_scores'",
    ),
    "nan score": ('{"query": "q", "pos": ["p"], "pos_scores": [NaN]}', "1 finite numbers"),
    "ambiguous": (
        '{"query": "q", "question": "r", "positive": "p"}',
        "one query column .*'query' and 'qu",
    ),
    "two positives": ('{"query": "q", "pos": "p", "positive": "p"}', "one positive column"),
    "blank line": ("", "expected a row, found an empty line"),
    "bad UTF-8": (
        b'{"query": "\xff", "positive": "p"}',
        "expected UTF-8 text, found byte 0xff at byte 12",
    ),
    "bad id": ('{"query": "q", "positive": "p", "id": [1]}', "'id' to be text or a whole number"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_bad_row_stops_with_line_or_is_skipped_and_listed(tmp_path: Path, fault: str) -> None:
    """Each kind of fault: named with its line, or left out while its neighbours are read."""
    row, message = FAULTS[fault]
    raw = row if isinstance(row, bytes) else row.encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), raw, GOOD.encode(), b""]))
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: expected ")
    with BadRows("skip", tmp_path / "out" / "bad.jsonl") as bad:
        for _ in range(2):  # a second pass over the file must not count twice
            assert texts(list(read_examples(source(path), None, bad))) == [("q", ["p"], [])] * 2
    assert bad.count == 1
    listed = _objects(tmp_path / "out" / "bad.jsonl")
    assert [r["where"] for r in listed] == [f"{path}:2"] and set(listed[0]) == {
        "where",
        "expected",
        "found",
    }


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_bad_lines_of_text_tables_keep_their_numbers(tmp_path: Path, kind: str) -> None:
    """Wrong field counts, bad bytes and open quotes; the rows after them are still read."""
    sep = "\t" if kind == "tsv" else ","
    lines = ["query,positive,negative", "a,b,c", "one,two", "d,e\xff,f", " ,x,y", "g,h,", ""]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes("\n".join(lines).replace(",", sep).encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"rows.{kind}:3: expected 3 .*-separated fields \(query, pos"
    ):
        read(path)
    bad = BadRows("skip", tmp_path / "bad.jsonl")
    wanted = [("a", ["b"], ["c"]), ("g", ["h"], [])]
    assert texts(list(read_examples(source(path), None, bad))) == wanted
    bad.close()
    assert [r["where"] for r in _objects(tmp_path / "bad.jsonl")] == [
        f"{path}:{n}" for n in (3, 4, 5)
    ]
    if kind == "csv":
        path.write_text('query,positive\n"a\nb",c\n"d"e,f\ng,h\n"open,i\n', "utf-8")
        bad = BadRows("skip", tmp_path / "bad2.jsonl")
        assert texts(list(read_examples(source(path), None, bad))) == [
            ("a\nb", ["c"], []),
            ("g", ["h"], []),
        ]
        bad.close()
        listed = _objects(tmp_path / "bad2.jsonl")
        assert [r["where"] for r in listed] == [f"{path}:{n}" for n in (4, 6)]
        assert "is a quote left open?" in listed[1]["found"]


def test_bad_rows_of_parquet_are_named_by_row(tmp_path: Path) -> None:
    """Nulls, and bytes that are not UTF-8 in a column that claims to be text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = pa.table({"query": broken, "positive": ["x", "y", None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    bad = BadRows("skip", tmp_path / "bad.jsonl")
    found = list(read_examples(source(tmp_path / "rows.parquet"), None, bad))
    bad.close()
    assert texts(found) == [("a", ["x"], [])]
    listed = _objects(tmp_path / "bad.jsonl")
    assert [r["where"] for r in listed] == [f"{tmp_path}/rows.parquet:{n}" for n in (2, 3)]
    assert listed[0]["expected"] == "UTF-8 text"
    data = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut.parquet: expected a Parquet file, found damage"):
        read(tmp_path / "cut.parquet")


DUPLICATE = "an id not used before, found '{}', the id of line 1"
BEIR_FAULTS = {  # file, line added, its number, message
    "duplicate document": ("corpus", '{"_id": "d1", "text": "x"}', 5, DUPLICATE.format("d1")),
    "duplicate query": ("queries", '{"_id": "q2", "text": "x"}', 4, DUPLICATE.format("q2")),
    "no id": ("corpus", '{"id": "x", "text": "x"}', 5, "a field '_id', found fields id, text"),
    "empty document": ("corpus", '{"_id": "x", "title": "", "text": " "}', 5, "found empty text"),
    "wrong type": ("queries", '{"_id": "x", "text": ["y"]}', 4, "found a list"),
    "bad title": (
        "corpus",
        '{"_id": "x", "title": 3, "text": "y"}',
        5,
        "'title' to be text, found",
    ),
    "unknown query": ("qrels", "nobody\td1\t1", 7, "a query id of queries.jsonl, found 'nobody'"),
    "unknown document": ("qrels", "q1\tno\t1", 7, "a document id of corpus.jsonl, found 'no'"),
    "fields": ("qrels", "q1 d1 1", 7, "3 tab-separated fields .* found 1"),
    "score": ("qrels", "q1\td2\thigh", 7, "a whole number as score, found 'high'"),
    "two scores": ("qrels", "q1\td1\t1", 7, "one score"),
}
BEIR_FILES = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}


@pytest.mark.parametrize("fault", list(BEIR_FAULTS))
def test_bad_rows_of_beir_folders_are_named_in_both_readers(tmp_path: Path, fault: str) -> None:
    """The streaming and the whole-set reader must agree on what is bad, and on what is left."""
    part, line, number, message = BEIR_FAULTS[fault]
    name = BEIR_FILES[part]
    clean = write_beir(tmp_path / "clean")
    root = write_beir(tmp_path / "bad")
    with open(root / name, "a", encoding="utf-8") as f:
        f.write(line + "\n")
    for reader in (lambda: read(root, "test"), lambda: read_retrieval_set(source(root), "test")):
        with pytest.raises(ValueError, match=message) as error:
            reader()
        assert str(error.value).startswith(f"{root}/{name}:{number}: expected ")
    bad = BadRows("skip")
    assert texts(list(read_examples(source(root), "test", bad))) == texts(read(clean, "test"))
    assert bad.count == 1
    bad = BadRows("skip")
    assert read_retrieval_set(source(root), "test", bad).qrels == read_beir(clean, "test").qrels
    assert bad.count == 1


def test_duplicate_row_id_with_another_query_is_bad(tmp_path: Path) -> None:
    """Two queries under one id would be scored as one; several rows of one query are fine."""
    rows = [
        {"id": 1, "query": "a", "positive": "x"},
        {"id": 1, "query": "a", "positive": "y"},
        {"id": 1, "query": "b", "positive": "z"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows.jsonl:3: .*duplicate id '1' with another query"):
        read(path)
    assert len(read(write_jsonl(path, rows[:2]))) == 2
    assert len(read(write_jsonl(path, rows), columns={"id": ""})) == 3


def test_paths_that_hold_nothing_say_what_is_there(tmp_path: Path) -> None:
    """A mistyped path is the most common fault of all."""
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "positive": "b"}])
    for root, message in (
        (tmp_path / "pair.jsonl", f"no such file or folder; did you mean {path}"),
        (tmp_path / "zzz", "holds pairs.jsonl"),
        (tmp_path / "no" / "such" / "place", f"nearest folder that exists is {tmp_path}"),
        ("owner/name", "for a data set of the hub add data.format=hub"),
    ):
        with pytest.raises(ValueError, match=message):
            detect(root)
    with pytest.raises(ValueError, match=r"data.root is not set"):
        list(read_examples(SourceConfig(), None))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"looked for corpus.jsonl .*found nothing"):
        detect(empty)
    (empty / "notes.md").write_text("x", "utf-8")
    with pytest.raises(ValueError, match=r"found notes.md"):
        detect(empty)
    (empty / "train.jsonl").write_text("\n \n", "utf-8")
    with pytest.raises(
        ValueError, match=r"train.jsonl: expected rows of data, found an empty file"
    ):
        read(empty, "train")
    (empty / "train.jsonl").unlink()
    (empty / "train.csv").write_text("query,positive\n", "utf-8")
    with pytest.raises(ValueError, match=r"train.csv: expected rows of data, found none"):
        read(empty, "train")
    damaged = gzip.compress(b'{"query": "a", "positive": "b"}\n' * 100)[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="found damage"):
        read(tmp_path / "cut.jsonl.gz")


def test_ambiguous_headers_and_columns_are_errors(tmp_path: Path) -> None:
    """A header taken for data is a false pair; a guessed column trains on the wrong text."""
    for text, message in (
        (
            "sentence1\tsentence2\tscore\na b\tc d\t5\n",
            "expected a header with a query and a positive",
        ),
        ("query\ttext\na\tb\n", "expected a header with a query and a positive"),
        ("1\twhat?\t2\tthat\n", "expected a header or texts alone"),
        ("query\tquery\tpositive\na\tb\tc\n", "distinct column names, found query twice"),
        ("query\tanswer\tcontext\na\tb\tc\n", "one positive column .*'answer' and 'context'"),
        ("only one field here\n", "at least 2 fields"),
    ):
        (tmp_path / "rows.tsv").write_text(text, "utf-8")
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "rows.tsv")
    with pytest.raises(ValueError, match=r"data.columns has 'querry'.*did you mean query"):
        read(tmp_path / "rows.tsv", columns={"querry": "x"})
    for name in ("train.jsonl", "train.tsv"):
        (tmp_path / name).write_text("query\tpositive\na\tb\n", "utf-8")
    with pytest.raises(
        ValueError, match=r"split 'train' is ambiguous, found train.jsonl, train.tsv"
    ):
        read(tmp_path, "train")


# Persian for id, question and answer; Chinese for question and answer
ID, QUESTION = "\u0634\u0646\u0627\u0633\u0647", "\u0633\u0624\u0627\u0644"
ANSWER = "\u067e\u0627\u0633\u062e"
WEN, DA = "\u95ee\u9898", "\u7b54\u6848"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(ID, QUESTION, ANSWER), ("1", f"{QUESTION} 1", f"{ANSWER} 1")], f"below '{ID}'"),
        ([(ID, QUESTION, ANSWER), ("\u06f1", QUESTION, ANSWER)], f"below '{ID}'"),
        ([("Row ID", "User Question", "Best Answer"), ("7", "a b", "c")], "below 'Row ID'"),
        ([("User Question", "Best Answer", "Votes"), *[("a b", "c", "3")] * 5], "below 'Votes'"),
        ([(ANSWER, QUESTION), *[(f"{ANSWER} " * 3, f"{QUESTION} " * 3)] * 3], "a header with"),
        ([(DA, WEN), *[(DA * 3, WEN * 3)] * 3], "a header with"),
    ],
)
@pytest.mark.parametrize("sign", [",", "\t"])
def test_a_header_in_any_script_is_no_example(tmp_path: Path, rows, message, sign) -> None:
    """Read by position, the id is the query, the question its answer and the answer a negative."""
    path = tmp_path / ("rows.csv" if sign == "," else "rows.tsv")
    path.write_text("".join(sign.join(r) + "\n" for r in rows), "utf-8")
    with pytest.raises(ValueError, match=f"rows.{path.suffix[1:]}:1: .*{message}") as caught:
        read(path)
    for remedy in ("data.columns={query: <name>, positive: <name>}", "{query: '0', positive: '1'}"):
        assert remedy in str(caught.value)
    names = {"query": rows[0][1], "positive": rows[0][-1 if len(rows[0]) > 2 else 0]}
    assert [e.query for e in read(path, columns=names)] == [r[1] for r in rows[1:]]


@pytest.mark.parametrize(
    "rows",
    [
        [(QUESTION, ANSWER), (f"{QUESTION} {QUESTION}?", f"{ANSWER}, {ANSWER}")],
        [(QUESTION, ANSWER), *[(f"{QUESTION} " * 9, ANSWER)] * 20],
        [(WEN, DA), (WEN * 9, DA * 9), (DA, WEN), (WEN * 9, DA * 9)],
        [("User Question", "Best Answer"), ("how old are you", "four"), ("a b", "c d")],
        [("capital of France", "Paris"), ("when did men walk on the moon", "1969")],
        [("who was it", "Ann Lee"), *[("how many are there?", "7")] * 4],
        [("what is it, really?", "No idea!"), *[("a longer question, " * 9, "words " * 20)] * 20],
    ],
)
def test_texts_without_a_header_are_read_in_any_script(tmp_path: Path, rows, caplog) -> None:
    """Short texts may come first; all that a guess may cost them is a warning that shows it."""
    path = tmp_path / "rows.tsv"
    path.write_text("".join("\t".join(r) + "\n" for r in rows), "utf-8")
    assert texts(read(path)) == [(q, [p], []) for q, p in rows]
    query, positive = rows[0]
    assert f"the first row is taken for query {query!r}, positive {positive!r}" in caplog.text
    assert [r.levelname for r in caplog.records if "go by position" in r.message] == ["WARNING"]


def test_all_rows_bad_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    """An empty training set must not pass as one that was cleaned."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "", "positive": "p"}] * 3)
    with pytest.raises(ValueError, match=r"all 3 rows are bad; first: .*rows.jsonl:1"):
        list(read_examples(source(path), None, BadRows("skip")))


# -- identity, memory ---------------------------------------------------------------------------


def test_normalise_joins_what_looks_the_same_and_keeps_case() -> None:
    """Relatives are found by this: NFKC and spaces must not hide them, case must not merge."""
    assert normalise("  \ufb01ne\u00a0 text\n") == "fine text"
    assert normalise("e\u0301") == normalise("\u00e9") != normalise("E\u0301")
    assert content_hash(" a  b") == content_hash("a b") != content_hash("A b")
    assert all(0 <= content_hash(str(i)) < 2**63 for i in range(100))


def test_reading_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """Python's own hashes change from run to run; ids, order and content hashes may not."""
    write_beir(tmp_path / "beir")
    rows = [
        {"query": f"q{i % 7}", "pos": [f"p{i}", f"p{i % 5}"], "neg": [f"n{i % 3}"]}
        for i in range(30)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    program = """
import sys
from conf.schema import SourceConfig
from data.formats import content_hash, read_examples, read_retrieval_set
for name, split in (("beir", "test"), ("rows.jsonl", None)):
    source = SourceConfig(root=sys.argv[1] + "/" + name)
    print(list(read_examples(source, split)), read_retrieval_set(source, split))
print(content_hash("text"))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and str(content_hash("text")) in outputs.pop()


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv", "parquet", "beir"])
def test_streams_hold_a_small_part_of_the_file(tmp_path: Path, kind: str) -> None:
    """Files larger than memory: the peak of what is held is far below the size of the texts."""
    num, filler = 4000, "word " * 400
    rows = [{"query": f"query {i}", "positive": f"{i} {filler}"} for i in range(num)]
    if kind == "beir":
        root = tmp_path / "beir"
        write_jsonl(
            root / "corpus.jsonl",
            [{"_id": f"d{i}", "text": r["positive"]} for i, r in enumerate(rows)],
        )
        write_jsonl(
            root / "queries.jsonl",
            [{"_id": f"q{i}", "text": r["query"]} for i, r in enumerate(rows)],
        )
        (root / "qrels").mkdir()
        lines = [f"q{i}\td{i}\t1\n" for i in range(num)]
        (root / "qrels" / "train.tsv").write_text("".join(lines), "utf-8")
    else:
        root = tmp_path / f"rows.{kind}"
        _write(root, rows, kind)
    size = num * len(filler)
    del rows
    stream = read_examples(source(root), "train" if kind == "beir" else None)
    tracemalloc.start()
    count = sum(1 for _ in stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == num
    # 256 rows of a Parquet batch are 6% of the texts, the BEIR index 64 KiB a part; the rest less
    assert peak < 0.2 * size, f"{peak} of {size} bytes"


def test_hash_index_agrees_with_a_dict() -> None:
    """Open addressing breaks at growth and at keys that share a slot."""
    rng = random.Random(0)
    index, plain = HashIndex(), {}
    for i in range(5000):
        key = rng.choice([rng.randrange(2**63), rng.randrange(50) * 1024, rng.randrange(50)])
        assert index.add(key, i) == plain.get(key)
        plain.setdefault(key, i)
    assert len(index) == len(plain)
    assert all(index.get(k) == v for k, v in plain.items())
    assert index.get(3 * 1024 + 2**40) is None
