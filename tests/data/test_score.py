"""Stage `score`: a teacher's scores beside the passages, against one pair at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from conf.schema import DataConfig, PrepareConfig, ScoreConfig, SourceConfig
from data.formats import read_groups
from data.groups import open_groups
from models.reranker import load_reranker

WORDS = "stone rain glass river cloud fire".split()


@pytest.fixture
def beir(tmp_path) -> Path:
    """Texts of ids; every query and passage is some letters."""
    folder = tmp_path / "beir"
    folder.mkdir()
    for name, letter in (("queries", "q"), ("corpus", "d")):
        rows = [{"_id": f"{letter}{n}", "text": f"{letter} {w} {n}"} for n, w in enumerate(WORDS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def labelled(tmp_path) -> Path:
    """q2 has no positive, q3 no negative, and q0 comes twice."""
    rows = [("q0", "d0", 1), ("q0", "d1", 0), ("q1", "d1", 1), ("q1", "d2", 0), ("q1", "d3", 0),
            ("q2", "d4", 0), ("q2", "d5", 0), ("q3", "d3", 1), ("q0", "d5", 0)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"query_id": q, "doc_id": d, "label": y}) + "\n" for q, d, y in rows)
    )
    return path


def config(tmp_path, data, **settings) -> PrepareConfig:
    score = ScoreConfig(**settings.pop("score", {}))
    shared = {"device": "cpu", "precision": "fp32", "cache_dir": str(tmp_path / "cache")}
    shared |= {"stages": ["score"], "data": str(data), "out": str(tmp_path / "out")}
    return PrepareConfig(**shared | settings, score=score)


def text(number: int, letter: str) -> str:
    return f"{letter} {WORDS[number]} {number}"


def scores_by_pair(path: Path) -> dict[tuple[str, str], float]:
    found = {}
    for row in map(json.loads, path.read_text().splitlines()):
        for side in ("positive", "negative"):
            for passage, score in zip(row[side], row[f"{side}_scores"], strict=True):
                found[row["query"], passage] = score
    return found


def test_a_cross_encoders_logits_stand_beside_every_passage(tmp_path, tiny_base, beir, labelled):
    """A score beside the wrong passage would be learnt without a word."""
    from evals.rerank import score_pairs
    from models.export_reranker import export_reranker

    torch.manual_seed(0)
    reranker = load_reranker(str(tiny_base)).eval()
    with torch.no_grad():
        reranker.head.out.weight.normal_()
    export_reranker(reranker, tmp_path / "teacher", {})
    score = {"model": str(tmp_path / "teacher"), "scale": 2.0, "texts": str(beir)}
    c = config(tmp_path, labelled, score=score)
    report = prepare.prepare(c, tmp_path / "out")["stages"]["score"]
    assert report["counts"] == {"pairs": 9, "positives": 3}
    assert report["teacher"] == "cross-encoder"
    found = scores_by_pair(tmp_path / "out/score.jsonl")
    assert len(found) == 9
    for (query, passage), value in found.items():
        alone = score_pairs(reranker, [query], [passage], [(0, 0)], precision="fp32")[0]
        assert value == pytest.approx(2 * alone, abs=1e-5)
    # read as a reranker's training set: the groups, labels and scores of the file
    data = DataConfig(
        root=str(tmp_path / "out/score.jsonl"), dev_fraction=0, test_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    store = open_groups(data, reranker.spec, reranker.tokenizer).train
    assert store.num_examples == 4
    values = np.concatenate([store.positive_scores, store.negative_scores])
    assert sorted(values) == pytest.approx(sorted(found.values()), abs=1e-6)


def test_a_retrievers_cosines_against_transformers(tmp_path, tiny_base, beir, labelled):
    import transformers

    c = config(tmp_path, labelled, score={"model": str(tiny_base), "texts": str(beir)})
    report = prepare.prepare(c, tmp_path / "out")["stages"]["score"]
    assert report["teacher"] == "retriever"
    model = transformers.AutoModel.from_pretrained(tiny_base).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_base / "tokenizer.json")
    )

    def embedded(one: str) -> torch.Tensor:
        inputs = tokenizer(one, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(hidden, dim=0)

    found = scores_by_pair(tmp_path / "out/score.jsonl")
    assert len(found) == 9 and np.std(list(found.values())) > 1e-3
    for (query, passage), value in found.items():
        assert value == pytest.approx(float(embedded(query) @ embedded(passage)), abs=2e-6)


def test_own_scores_are_replaced_and_all_else_is_kept(tmp_path, tiny_base):
    rows = [
        {"query_id": "a", "query": "stone", "positive": ["rain", "glass"], "negative": ["river"],
         "positive_scores": [9.0, 8.0], "negative_scores": [7.0], "positive_grades": [3.0, 1.0]},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    prepare.prepare(config(tmp_path, path, score={"model": str(tiny_base)}), tmp_path / "out")
    (row,) = map(json.loads, (tmp_path / "out/score.jsonl").read_text().splitlines())
    assert all(abs(x) <= 1 for x in row["positive_scores"] + row["negative_scores"])
    for name in ("query_id", "query", "positive", "negative", "positive_grades"):
        assert row[name] == rows[0][name]
    (again,) = read_groups(SourceConfig(root=str(tmp_path / "out/score.jsonl")), None)
    assert again.positive_scores == row["positive_scores"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "score.model is not set: name the teacher"),
        ({"score": {"model": "nowhere/at_all"}}, "nowhere/at_all"),
        (
            {"score": {"model": "BASE"}},
            r"rows.jsonl.*score.texts",
        ),  # ids, and nothing they stand for
        ({"score": {"model": "BASE"}, "data": "EMPTY"}, "empty.jsonl"),
    ],
)
def test_what_cannot_be_scored_says_so(tmp_path, tiny_base, labelled, settings, message):
    (tmp_path / "empty.jsonl").touch()
    settings = json.loads(
        json.dumps(settings)
        .replace("BASE", str(tiny_base))
        .replace("EMPTY", str(tmp_path / "empty.jsonl"))
    )
    data = settings.pop("data", labelled)
    with pytest.raises(ValueError, match=message) as error:
        prepare.prepare(config(tmp_path, data, **settings), tmp_path / "out")
    assert "data.root" not in str(error.value) and "data.texts" not in str(error.value)
    with pytest.raises(ValueError, match=r"score.scale"):
        ScoreConfig(scale=0)
