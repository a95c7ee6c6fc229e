"""What a training run checks before it works, and what it publishes."""

from types import SimpleNamespace

import pytest

from conf.schema import TrainConfig
from evals.final import check_dev
from evals.publish import card_of


def test_evaluation_that_cannot_be_had_is_refused_before_training():
    """Otherwise the first evaluation, hours in, is where a typo shows."""
    with pytest.raises(ValueError, match=r"best_metric \('ndgc@10'\) must be one of .*ndcg@10"):
        check_dev(TrainConfig(best_metric="ndgc@10"), SimpleNamespace(dev={}))
    with pytest.raises(ValueError, match="data has none"):
        check_dev(TrainConfig(eval_every=5), SimpleNamespace(dev={}))
    check_dev(TrainConfig(), SimpleNamespace(dev={}))


def test_a_model_card_names_no_folder_of_the_user():
    """The card is made to be published."""
    c = TrainConfig()
    c.model.base, c.data.root = "some/model", "/home/someone/secret/pairs.jsonl"
    numbers = ("steps", "train_s", "examples_per_s", "tokens_per_s", "peak_memory_mib")
    card = card_of(c, dict.fromkeys(numbers, 1), dims=[384])
    assert card["data"] == "pairs.jsonl (auto)" and "secret" not in str(card)
