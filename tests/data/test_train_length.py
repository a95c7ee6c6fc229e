"""Shorter texts in training than in use: a setting of the data, not of the model."""

import json

from conf.schema import DataConfig, ModelConfig
from data.datasets import open_data
from models.build import build_model


def test_training_texts_are_cut_and_the_model_keeps_its_length(tiny_base, tmp_path):
    """Cutting through model.max_passage_length would also cut the exported model."""
    rows = [{"query": f"q {i} {'x ' * 30}", "positive": f"p {i} {'y ' * 30}"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    towers = build_model(ModelConfig(base=str(tiny_base)), dims=[])
    before = (towers.spec.max_query_length, towers.spec.max_passage_length)
    c = DataConfig(root=str(path), max_train_length=10, cache_dir=str(tmp_path / "cache"))
    data = open_data(c, towers.spec, towers.tokenizer_query, towers.tokenizer_passage)
    (one,) = data.train.sets
    assert one.queries.length_n.max() == 10 and one.passages.length_n.max() == 10
    assert (towers.spec.max_query_length, towers.spec.max_passage_length) == before
