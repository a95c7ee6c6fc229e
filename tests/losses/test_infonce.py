"""The plain loss against loops in float64 and against other libraries' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from conf.schema import LossConfig
from losses.infonce import InfoNCE, Targets


def unit(*shape, seed=0):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def infonce(q_BD, p_ND, targets, *, temperature, symmetric=0.0):
    """The loss at exactly this temperature, in the embeddings' type."""
    module = InfoNCE(LossConfig(temperature=temperature, symmetric=symmetric)).to(q_BD.dtype)
    module.log_temperature.fill_(math.log(temperature))
    return module(q_BD, p_ND, targets)


def plain_targets(B: int) -> Targets:
    at = torch.arange(B)
    return Targets(at, at, torch.ones(B), at[:, None].clone(), B)


def ragged_targets() -> Targets:
    """4 queries, 7 passages: query 0 has two positives, query 2 a relative that is no positive of
    this batch."""
    return Targets(
        pair_query_P=torch.tensor([0, 0, 1, 2, 3]),
        pair_passage_P=torch.tensor([4, 1, 0, 2, 6]),
        pair_weight_P=torch.tensor([0.5, 0.5, 1, 1, 1], dtype=torch.float64),
        relatives_BK=torch.tensor([[4, 1, -1], [0, -1, -1], [2, 5, 1], [6, -1, -1]]),
        num_examples=4,
    )


def by_loops(q, p, targets: Targets, temperature: float, symmetric: float) -> float:
    """The definition, one exponential at a time."""
    z = [[float(a @ b) / temperature for b in p] for a in q]
    relatives = [{c for c in row.tolist() if c >= 0} for row in targets.relatives_BK]
    total = 0.0
    for b, j, w in zip(targets.pair_query_P.tolist(), targets.pair_passage_P.tolist(),
                       targets.pair_weight_P.tolist(), strict=True):  # fmt: skip
        row = sum(math.exp(z[b][n]) for n in range(len(p)) if n not in relatives[b])
        column = sum(math.exp(z[i][j]) for i in range(len(q)) if j not in relatives[i])
        of_row = -math.log(math.exp(z[b][j]) / (math.exp(z[b][j]) + row))
        of_column = -math.log(math.exp(z[b][j]) / (math.exp(z[b][j]) + column))
        total += w * ((1 - symmetric) * of_row + symmetric * of_column)
    return total / targets.num_examples


@pytest.mark.parametrize("symmetric", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_loss_equals_its_definition(symmetric, temperature):
    """Several positives, relatives, hard negatives: each mask in the definition must be in the
    code."""
    q, p, targets = unit(4, 5), unit(7, 5, seed=1), ragged_targets()
    loss, _ = infonce(q, p, targets, temperature=temperature, symmetric=symmetric)
    assert loss.item() == pytest.approx(by_loops(q, p, targets, temperature, symmetric), rel=1e-10)


def test_in_batch_loss_equals_cross_entropy():
    """With one positive each and no other relatives it is cross entropy over the rows (another
    formula)."""
    q, p = unit(6, 8).requires_grad_(), unit(9, 8, seed=1).requires_grad_()
    at = torch.arange(6)
    loss, _ = infonce(q, p, Targets(at, at, torch.ones(6), at[:, None], 6), temperature=0.05)
    grads = torch.autograd.grad(loss, (q, p))
    expected = F.cross_entropy(q @ p.T / 0.05, at)
    expected_grads = torch.autograd.grad(expected, (q, p))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for g, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-14)


def test_gradient_of_easy_rows_does_not_cancel():
    """At a loss of 1e-8 a log-softmax in float32 has no digits left; softplus of the margin keeps
    them all."""
    q = torch.eye(8, 16)
    targets = plain_targets(8)
    exact, _ = infonce(q.double(), q.double(), targets, temperature=0.05)
    q32 = q.clone().requires_grad_()
    loss, _ = infonce(q32, q, targets, temperature=0.05)
    assert 1e-9 < exact.item() < 1e-7
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    q64 = q.double().requires_grad_()
    infonce(q64, q.double(), targets, temperature=0.05)[0].backward()
    loss.backward()
    torch.testing.assert_close(q32.grad.double(), q64.grad, rtol=1e-4, atol=0)


def test_rows_without_a_negative_cost_nothing():
    """A query whose every candidate is a relative: loss 0, gradient 0, never nan."""
    q = unit(2, 4).requires_grad_()
    p = unit(2, 4, seed=1)
    at = torch.arange(2)
    targets = Targets(at, at, torch.ones(2), torch.tensor([[0, 1], [0, 1]]), 2)
    loss, _ = infonce(q, p, targets, temperature=0.05, symmetric=0.5)
    loss.backward()
    assert loss.item() == 0 and torch.equal(q.grad, torch.zeros_like(q))


def test_matryoshka_is_the_weighted_mean_of_one_loss_a_dim():
    """Prefixes are normalised again; weights are relative."""
    q, p, targets = unit(4, 8), unit(7, 8, seed=1), ragged_targets()
    c = LossConfig(temperature=0.1, dims=[8, 3, 2], dim_weights=[1.0, 2.0, 0.5])
    loss, numbers = InfoNCE(c).double()(q, p, targets)
    expected = sum(
        w
        * by_loops(F.normalize(q[:, :d], dim=-1), F.normalize(p[:, :d], dim=-1), targets, 0.1, 0.0)
        for d, w in zip(c.dims, c.dim_weights, strict=True)
    ) / sum(c.dim_weights)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # the temperature is kept in float32
    scores = q @ p.T / 0.1
    assert numbers["mean_similarity"] == pytest.approx(scores.mean().item(), rel=1e-6)
    assert numbers["diagonal"] == pytest.approx(
        (scores[targets.pair_query_P, targets.pair_passage_P] * targets.pair_weight_P).sum().item()
        / targets.num_examples,
        rel=1e-6,
    )


def test_learned_temperature_has_the_right_gradient_and_stays_in_bounds():
    """d loss / d log temperature against a central difference; past a bound it must not move
    further."""
    q, p, targets = unit(4, 5), unit(7, 5, seed=1), ragged_targets()
    module = InfoNCE(LossConfig(temperature=0.1, learn_temperature=True)).double()
    module(q, p, targets)[0].backward()
    step = 1e-6
    near = [
        infonce(q, p, targets, temperature=module.temperature.item() * math.exp(s))[0]
        for s in (step, -step)
    ]
    assert module.log_temperature.grad.item() == pytest.approx(
        ((near[0] - near[1]) / (2 * step)).item(), rel=1e-6
    )
    with torch.no_grad():
        module.log_temperature.fill_(math.log(50.0))
    assert module.temperature.item() == pytest.approx(1.0)


def test_embeddings_of_different_width_are_refused():
    """The message names both shapes."""
    with pytest.raises(ValueError, match=r"q \(4, 5\), p \(7, 6\)"):
        infonce(unit(4, 5), unit(7, 6), ragged_targets(), temperature=0.1)
