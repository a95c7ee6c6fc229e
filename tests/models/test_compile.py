"""torch.compile is a setting of the runtime: it may not change results beyond a stated bound."""

import shutil

import numpy as np
import pytest

from conf.schema import ModelConfig, TrainConfig
from models.build import build_model
from models.transformer import pack
from train import prepare_runtime

BOUND = 1e-5  # fused kernels round sums of at most 64 terms in another order


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
def test_compiled_layers_give_the_same_embeddings_and_gradients(tiny_base):
    """Ragged packs of two shapes: a program specialised to the first would fail or be wrong on the
    second."""
    rng = np.random.default_rng(0)
    packs = [
        pack([rng.integers(5, 90, n) for n in lengths]) for lengths in ([9, 9, 4], [21, 7, 7, 7, 1])
    ]
    found = []
    for compiled in (False, True):
        c = TrainConfig(model=ModelConfig(base=str(tiny_base), dropout=0.0))
        c.runtime.compile = compiled
        towers = build_model(c.model, dims=[]).train()
        names = [n for n, _ in towers.named_parameters()]
        prepare_runtime(towers, c)
        assert [n for n, _ in towers.named_parameters()] == names
        embeddings = [towers.encode_passage(packed) for packed in packs]
        sum((e[:, 0] * e[:, 1]).sum() for e in embeddings).backward()
        gradients = [p.grad for p in towers.parameters()]
        found.append([x for x in [*embeddings, *gradients] if x is not None])
    assert len(found[0]) == len(found[1])
    for eager, fused in zip(*found, strict=True):
        assert (eager - fused).abs().max() <= BOUND
