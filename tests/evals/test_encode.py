"""Encoding many texts: order, sorting by length, prompts and sharing must all be invisible."""

import numpy as np
import pytest
import torch

from conf.schema import ModelConfig
from data.records import RetrievalSet
from data.tokens import tokenise
from evals.encode import encode
from evals.retrieval import encode_sets
from models.build import build_model
from models.transformer import pack

TEXTS = ["b" * n for n in (30, 1, 7, 7, 12)] + ["alpha beta", "gamma", "delta epsilon zeta"]


@pytest.fixture(scope="module")
def towers(tiny_base):
    return build_model(
        ModelConfig(base=str(tiny_base), query_prompt="ask: ", max_query_length=20), dims=[]
    )


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_texts_come_back_in_their_order(towers, batch_tokens):
    """Sorted by length, cut by a budget and put back: against one text at a time."""
    found = encode(towers, TEXTS, "query", precision="fp32", batch_tokens=batch_tokens)
    towers.eval()
    with torch.no_grad():
        for text, row in zip(TEXTS, found, strict=True):
            (tokens,) = tokenise(towers.tokenizer_query, [text], "ask: ", 20)
            alone = towers.encode_query(pack([tokens])).numpy()[0]
            np.testing.assert_allclose(row, alone, atol=2e-6)  # float32 sums in another order
    towers.train()


def test_training_mode_is_put_back(towers):
    """Evaluation in the middle of training must not leave dropout off."""
    towers.train()
    encode(towers, TEXTS, "passage")
    assert towers.passage.training


def test_sets_share_texts_but_not_prompts(towers):
    """A text of two sets is encoded once under one prompt, and apart under two."""
    ids = [f"d{i}" for i in range(len(TEXTS))]

    def one(name: str) -> RetrievalSet:
        return RetrievalSet(name, ids, TEXTS, ["q"], ["gamma"], {"q": {"d0": 1}})

    sets = {"a": one("a"), "b": one("b"), "c": one("c")}
    prompts = {"a": (None, None), "b": (None, None), "c": ("other: ", "doc: ")}
    found = encode_sets(towers, sets, prompts=prompts, precision="fp32")
    own = encode(towers, TEXTS, "passage", precision="fp32")
    np.testing.assert_allclose(found["a"][1], own, atol=2e-6)
    assert np.array_equal(found["a"][1], found["b"][1])
    other = encode(towers, TEXTS, "passage", precision="fp32", prompt="doc: ")
    np.testing.assert_allclose(found["c"][1], other, atol=2e-6)
    assert np.abs(found["c"][1] - own).max() > 1e-3


def test_bf16_embeddings_are_near_float32(towers):
    """The default on hardware that has bf16 must not cost quality: cosine >= .9999."""
    exact, rounded = (encode(towers, TEXTS, "passage", precision=p) for p in ("fp32", "bf16"))
    assert (exact * rounded).sum(1).min() >= 0.9999


def test_no_texts_give_no_rows(towers):
    """An empty list is a shape, not an error."""
    assert encode(towers, [], "query").shape == (0, towers.width)
