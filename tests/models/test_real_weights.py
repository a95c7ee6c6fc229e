"""Parity with transformers on real pretrained weights, where they are at hand."""

import os
from pathlib import Path

import pytest
import torch

from conf.schema import ModelConfig
from data.tokens import tokenise
from models.build import build_model
from models.pretrained import resolve_base
from models.transformer import pack

BOUND = 2e-5
TEXTS = [
    "def attention(q, k, v): return softmax(q @ k.T) @ v",
    "Where is the nearest library?",
    "Merhaba, bug\u00fcn hava nas\u0131l?",
    "\u0645\u0627 \u0647\u064a \u0639\u0627\u0635\u0645\u0629 \u0645\u0635\u0631\u061f",
    "one",
    "a longer text " * 30,
]
FOLDERS = Path(os.environ.get("WEIGHTS_DIR", "artifacts/models"))


def folder_of(name: str) -> Path:
    """MiniLM comes from its package; the others lie under $WEIGHTS_DIR or artifacts/models."""
    if name == "all-MiniLM-L6-v2":
        try:
            return resolve_base(name)
        except ValueError as error:
            pytest.skip(f"its package is not installed: {error}")
    if not (FOLDERS / name / "model.safetensors").is_file():
        pytest.skip(f"no folder {FOLDERS / name}; set WEIGHTS_DIR")
    return FOLDERS / name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["all-MiniLM-L6-v2", "all-mpnet-base-v2", "multilingual-e5-small-q4"]
)
def test_real_weights_give_the_hidden_states_and_gradients_of_transformers(name):
    """Small random models hide what only trained ones have: large norms, outlier dimensions, long
    texts."""
    from transformers import AutoModel

    folder = folder_of(name)
    towers = build_model(ModelConfig(base=str(folder), dropout=0.0), dims=[]).eval()
    encoder = towers.passage.encoder
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = tokenise(towers.tokenizer_passage, TEXTS, "", 128)
    pad = theirs.config.pad_token_id
    ids = torch.full((len(tokens), max(map(len, tokens))), pad)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(tokens):
        ids[row, : len(one)] = torch.from_numpy(one)
        mask[row, : len(one)] = 1
    hidden_TC = encoder(pack(tokens))
    expected_TC = theirs(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (hidden_TC - expected_TC).abs().max() <= BOUND

    weight_TC = torch.randn(expected_TC.shape, generator=torch.Generator().manual_seed(0)) / 100
    (hidden_TC * weight_TC).sum().backward()
    (expected_TC * weight_TC).sum().backward()
    ours, word = encoder.embeddings.word.weight.grad, theirs.get_input_embeddings().weight.grad
    ours[pad] = 0  # transformers freezes the padding row; in e5-small-q4 its number is that of <s>
    assert (ours - word).abs().max() <= BOUND * max(1.0, word.abs().max().item())
