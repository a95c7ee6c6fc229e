"""The training step: its gradient is that of the whole batch at once, however the batch is cut."""

import numpy as np
import pytest
import torch

from conf.schema import LossConfig, ModelConfig
from data.batches import Batch
from losses.grad_cache import targets_on, train_step
from losses.infonce import InfoNCE
from models.build import build_model
from models.transformer import Dropout, pack
from runtime.device import autocast_for

CPU = torch.device("cpu")


def random_batch(num_queries: int = 5, num_passages: int = 9, seed: int = 0) -> Batch:
    """Ragged texts, hard negatives (N > B), a query with two positives."""
    rng = np.random.default_rng(seed)

    def texts(count: int, longest: int) -> list[np.ndarray]:
        return [
            rng.integers(5, 90, rng.integers(1, longest)).astype(np.int32) for _ in range(count)
        ]

    relatives = np.full((num_queries, 2), -1, np.int64)
    relatives[:, 0] = np.arange(num_queries)
    relatives[0, 1] = num_queries
    return Batch(
        query_tokens=texts(num_queries, 12),
        passage_tokens=texts(num_passages, 30),
        pair_query_P=np.array([0, *range(num_queries)]),
        pair_passage_P=np.array([num_queries, *range(num_queries)]),
        pair_weight_P=np.array([0.5, 0.5, *[1.0] * (num_queries - 1)], np.float32),
        relatives_BK=relatives,
        num_examples=num_queries,
        num_examples_global=num_queries,
        passage_offset=0,
        num_passages_global=num_passages,
        query_prompt_tokens_B=np.zeros(num_queries, np.int32),
        passage_prompt_tokens_N=np.zeros(num_passages, np.int32),
        example_ids=[f"e{i}" for i in range(num_queries)],
    )


def gradients(towers, loss_fn) -> dict[str, torch.Tensor]:
    named = [*towers.named_parameters(), *loss_fn.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", ["single", "dual"])
@pytest.mark.parametrize("chunk_tokens", [1, 17, 10_000])
def test_any_chunking_gives_the_gradient_of_the_whole_batch(kind, chunk_tokens, tiny_base):
    """Against one plain forward and backward in float64: a chunk lost, doubled or misplaced
    shows."""
    c = LossConfig(temperature=0.1, dims=[16, 4], learn_temperature=True, symmetric=0.25)
    batch = random_batch()
    towers = build_model(
        ModelConfig(base=str(tiny_base), towers=kind, dropout=0.0), dims=[]
    ).double()
    loss_fn = InfoNCE(c).double()
    q_BD = towers.encode_query(pack(batch.query_tokens))
    p_ND = towers.encode_passage(pack(batch.passage_tokens))
    expected_loss, _ = loss_fn(q_BD, p_ND, targets_on(batch, CPU))
    expected_loss.backward()
    expected = gradients(towers, loss_fn)
    for p in [*towers.parameters(), *loss_fn.parameters()]:
        p.grad = None

    loss, _ = train_step(
        towers, loss_fn, batch, seed=0, step=0, chunk_tokens=chunk_tokens, device=CPU,
        autocast=autocast_for("fp32", CPU),
    )  # fmt: skip
    found = gradients(towers, loss_fn)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-14, msg=name)


def test_a_frozen_tower_gets_no_gradient(tiny_base):
    """Half-frozen dual towers: the frozen side is encoded, its chunks have no graph to walk
    back."""
    towers = build_model(
        ModelConfig(base=str(tiny_base), towers="dual", freeze=["passage_tower"]), dims=[]
    )
    loss_fn = InfoNCE(LossConfig())
    train_step(
        towers, loss_fn, random_batch(), seed=0, step=0, chunk_tokens=20, device=CPU,
        autocast=autocast_for("fp32", CPU),
    )  # fmt: skip
    assert all(p.grad is None for p in towers.passage.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in towers.query.parameters())


def test_dropout_masks_depend_on_seed_and_step_alone(tiny_base):
    """The promise behind exact resume: whatever was drawn before a step must not matter."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.3), dims=[]).train()
    assert any(isinstance(m, Dropout) and m.p == 0.3 for m in towers.modules())
    loss_fn = InfoNCE(LossConfig())

    def step(number: int) -> torch.Tensor:
        towers.zero_grad(set_to_none=True)
        train_step(
            towers, loss_fn, random_batch(), seed=7, step=number, chunk_tokens=40, device=CPU,
            autocast=autocast_for("fp32", CPU),
        )  # fmt: skip
        return torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])

    first = step(3)
    torch.rand(1000)
    assert torch.equal(step(3), first)
    assert not torch.equal(step(4), first)


def test_bf16_autocast_stays_near_float32(tiny_base):
    """bf16 has 8 bits: a gradient off by far more than 2^-8 a layer means a cast in the wrong
    place."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[])
    loss_fn = InfoNCE(LossConfig(temperature=0.5))
    found = []
    for precision in ("fp32", "bf16"):
        towers.zero_grad(set_to_none=True)
        train_step(
            towers, loss_fn, random_batch(), seed=0, step=0, chunk_tokens=10_000, device=CPU,
            autocast=autocast_for(precision, CPU),
        )  # fmt: skip
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in towers.parameters())
        found.append(
            torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])
        )
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.05
