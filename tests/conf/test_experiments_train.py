"""Every experiment trains two steps, on a tiny random model and generated text."""

import json
import sys

import pytest

from conf.cli import list_experiments, main
from conf.schema import TrainConfig


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a random BERT of 2 x 16 and a word-piece tokenizer of single characters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters)]
    tokenizer = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list_experiments())
def test_experiment_trains_two_steps(name, tiny_model, tmp_path, monkeypatch):
    """A config that composes may still name something that the code does not have."""
    train = pytest.importorskip("train").train
    monkeypatch.chdir(tmp_path)
    args = [
        f"+experiment={name}", "model=custom", f"model.base={tiny_model}", "data=toy",
        "model.max_query_length=32", "model.max_passage_length=32", "loss.dims=[8,4]",
        "optim.steps=2", "optim.batch_size=4", "runtime=cpu", "runtime.precision=fp32",
        "wandb=disabled", "log_every=1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    main(TrainConfig, "train", train)
    (result,) = tmp_path.glob(f"runs/{name}/*/seed0/result.json")
    rows = (result.parent / "metrics.jsonl").read_text().splitlines()
    losses = {row["step"]: row["loss"] for row in map(json.loads, rows) if "loss" in row}
    assert losses.keys() == {1, 2} and all(0 < loss < 20 for loss in losses.values())
    assert json.loads(result.read_text())["steps"] == 2
