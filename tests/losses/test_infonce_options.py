"""Every option of the loss against its equation, one cell and one exponential at a time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import LossConfig
from losses.build import build_loss
from losses.infonce import Targets, dims_of_step, log_sum
from tests.losses import test_infonce as plain_loss
from tests.losses.test_infonce import unit

ALL = ["query_passage", "query_query", "passage_passage", "passage_query"]


def ragged_targets() -> Targets:
    """Those of the plain loss, with queries that share an answer, and a guide."""
    return replace(
        plain_loss.ragged_targets(),
        query_relatives_BK=torch.tensor([[0, 2], [1, -1], [2, 0], [3, -1]]),
        guide_query_AE=unit(4, 3, seed=5),
        guide_passage_NE=unit(7, 3, seed=6),
    )


def prefix(x_nD: Tensor, dim: int) -> Tensor:
    return x_nD if dim == x_nD.shape[1] else F.normalize(x_nD[:, :dim], dim=1)


def by_cells(c: LossConfig, q_BD: Tensor, p_ND: Tensor, t: Targets, temperature: Tensor) -> Tensor:
    """The docstring of losses/infonce.py as loops over cells."""
    dims, weights = c.dims or [q_BD.shape[1]], c.dim_weights or [1.0] * max(1, len(c.dims))
    losses = [of_dim(c, prefix(q_BD, d), prefix(p_ND, d), t, temperature) for d in dims]
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    return total / sum(weights)


def of_dim(c: LossConfig, q: Tensor, p: Tensor, t: Targets, temperature: Tensor) -> Tensor:
    B, N = len(q), len(p)
    relatives = [set(row.tolist()) for row in t.relatives_BK]
    friends = [set(row.tolist()) for row in t.query_relatives_BK]
    gq, gp = (t.guide_query_AE, t.guide_passage_NE) if c.guide else (q.detach(), p.detach())
    pairs = list(zip(t.pair_query_P.tolist(), t.pair_passage_P.tolist(), strict=True))

    def limit(positives: list[float]) -> float:
        limits = [math.inf]
        if c.false_negative_margin is not None:
            limits.append(max(positives) + c.false_negative_margin)
        if c.false_negative_ratio is not None:
            limits.append(max(positives) * c.false_negative_ratio)
        return min(limits)

    def loss_of(positive: Tensor, cosines: list[Tensor]) -> Tensor:
        z = positive / temperature
        if not cosines:
            return 0 * z
        others = torch.stack([x / temperature + c.hardness * x.detach() for x in cosines])
        n, total = len(cosines), others.exp().sum()
        if c.debias:
            total = (total - c.debias * n * z.exp()) / (1 - c.debias)
            total = torch.maximum(total, n * torch.exp(-1 / temperature))
        log_all = torch.log(total + z.exp())
        smooth = (z + others.sum()) / (n + 1)
        return log_all - (1 - c.label_smoothing) * z - c.label_smoothing * smooth

    result = 0
    for (b, j), weight in zip(pairs, t.pair_weight_P.tolist(), strict=True):
        of_query = limit([float(gq[b] @ gp[n]) for a, n in pairs if a == b])
        of_passage = limit([float(gq[a] @ gp[j]) for a, n in pairs if n == j])
        row = [q[b] @ p[n] for n in range(N)
               if n not in relatives[b] and gq[b] @ gp[n] <= of_query]  # fmt: skip
        column = [q[a] @ p[j] for a in range(B)
                  if j not in relatives[a] and gq[a] @ gp[j] <= of_passage]  # fmt: skip
        if "query_query" in c.negatives:
            row += [q[b] @ q[a] for a in range(B)
                    if a not in friends[b] and gq[b] @ gq[a] <= of_query]  # fmt: skip
        if "passage_passage" in c.negatives:
            row += [p[j] @ p[n] for n in range(N)
                    if n not in relatives[b] and gp[j] @ gp[n] <= of_query]  # fmt: skip
        if "passage_query" in c.negatives:
            row += column
        rows, columns = loss_of(q[b] @ p[j], row), loss_of(q[b] @ p[j], column)
        pair = (1 - c.symmetric) * rows + c.symmetric * columns
        if c.teacher_weight:
            teacher = torch.softmax(gq[b] @ gp.T / c.teacher_divisor, 0)
            model = torch.log_softmax(q[b] @ p.T / temperature, 0)
            kl = (teacher * (teacher.log() - model)).sum()
            pair = (1 - c.teacher_weight) * pair + c.teacher_weight * kl
        result = result + weight * pair
    return result / t.num_examples


OPTIONS = [
    {},
    {"symmetric": 0.3},
    {"negatives": ALL[:2]},
    {"negatives": [ALL[0], ALL[2]], "symmetric": 0.5},
    {"negatives": ALL},
    {"negatives": ALL, "symmetric": 0.4, "false_negative_margin": 0.1},
    {"false_negative_ratio": 0.95},
    {"false_negative_ratio": 0.9, "false_negative_margin": -0.05, "symmetric": 1.0},
    {"negatives": ALL, "symmetric": 0.4, "guide": "g", "false_negative_margin": 0.0},
    {"label_smoothing": 0.1, "symmetric": 0.3},
    {"label_smoothing": 0.1, "negatives": ALL},
    {"hardness": 4.0, "symmetric": 0.3, "negatives": ALL},
    {"debias": 0.1, "symmetric": 0.2},
    {"debias": 0.6},  # most pairs stand on the floor
    {"hardness": 2.0, "debias": 0.05},
    {"guide": "g", "false_negative_margin": 0.2, "teacher": "g", "teacher_weight": 0.4},
]


@pytest.mark.parametrize("dims", [[], [5, 3, 2], [2, 4]])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_loss_and_gradients_equal_the_equations(options, dims):
    """Loops over cells share no index arithmetic and no log-sum-exp with the code."""
    c = LossConfig(temperature=0.3, dims=dims, dim_weights=[1.0, 2.0, 0.5][: len(dims)],
                   learn_temperature=True, **options)  # fmt: skip
    loss_fn = build_loss(c).double()
    q_BD, p_ND = unit(4, 5).requires_grad_(), unit(7, 5, seed=1).requires_grad_()
    loss, _ = loss_fn(q_BD, p_ND, ragged_targets())
    found = torch.autograd.grad(loss, (q_BD, p_ND, loss_fn.log_temperature))
    log_temperature = loss_fn.log_temperature.detach().clone().requires_grad_()
    reference = by_cells(c, q_BD, p_ND, ragged_targets(), log_temperature.exp())
    expected = torch.autograd.grad(reference, (q_BD, p_ND, log_temperature))
    assert loss.item() == pytest.approx(reference.item(), rel=1e-10)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-13)


def test_sigmoid_loss_equals_its_equation():
    """Against binary cross-entropy over the kept cells, bias and temperature learned."""
    c = LossConfig(kind="sigmoid", temperature=0.2, learn_temperature=True, sigmoid_bias=-2.0)
    loss_fn = build_loss(c).double()
    q_BD, p_ND = unit(4, 5).requires_grad_(), unit(7, 5, seed=1).requires_grad_()
    t = ragged_targets()
    loss, numbers = loss_fn(q_BD, p_ND, t)
    found = torch.autograd.grad(loss, (q_BD, p_ND, loss_fn.log_temperature, loss_fn.bias))
    z_BN = q_BD @ p_ND.T / loss_fn.temperature + loss_fn.bias
    weight_BN, label_BN = torch.ones_like(z_BN), torch.zeros_like(z_BN)
    for b, row in enumerate(t.relatives_BK.tolist()):
        weight_BN[b, [n for n in row if n >= 0]] = 0
    weight_BN[t.pair_query_P, t.pair_passage_P] = t.pair_weight_P
    label_BN[t.pair_query_P, t.pair_passage_P] = 1
    reference = F.binary_cross_entropy_with_logits(z_BN, label_BN, weight_BN, reduction="sum") / 4
    expected = torch.autograd.grad(reference, (q_BD, p_ND, loss_fn.log_temperature, loss_fn.bias))
    assert loss.item() == pytest.approx(reference.item(), rel=1e-10)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-13)
    assert numbers["bias"] == -2.0


def test_the_positive_is_exempt_from_every_limit():
    """PITFALLS 7: a margin <= 0 must not mask the positive itself, whatever the score."""
    q_BD, p_ND = unit(6, 8), unit(6, 8, seed=1)
    at = torch.arange(6)
    t = Targets(at, at, torch.ones(6), at[:, None], 6)
    for options in ({"false_negative_margin": -2.0}, {"false_negative_ratio": 0.01}):
        loss, _ = build_loss(LossConfig(**options))(q_BD, p_ND, t)
        assert loss.isfinite() and loss >= 0


def test_a_sample_of_dims_is_seeded_and_fair():
    """The same dims on every rank and after a resume; their weights average to the whole loss."""
    c = LossConfig(dims=[8, 4, 2, 1], dim_weights=[1.0, 2.0, 3.0, 4.0], dims_per_step=2)
    draws = [dims_of_step(c, 8, 3, step) for step in range(3000)]
    assert draws[5][0] == dims_of_step(c, 8, 3, 5)[0]
    mean = {d: 0.0 for d in c.dims}
    for dims, weight_M in draws:
        assert len(dims) == 2 and dims == sorted(dims)
        for d, w in zip(dims, weight_M.tolist(), strict=True):
            mean[d] += w / len(draws)
    for d, w in zip(c.dims, c.dim_weights, strict=True):
        assert mean[d] == pytest.approx(w / 10, rel=0.08)  # 3,000 draws: about 2% standard error
    whole, weight_M = dims_of_step(replace(c, dims_per_step=0), 8, 3, 5)
    assert whole == [1, 2, 4, 8] and weight_M.sum() == pytest.approx(1)


def test_numbers_are_means_over_pairs_and_cells():
    """mean_similarity comes from sums of vectors; here from the matrix."""
    q_BD, p_ND, t = unit(4, 5), unit(7, 5, seed=1), ragged_targets()
    _, numbers = build_loss(LossConfig(temperature=0.1, dims=[2, 4])).double()(q_BD, p_ND, t)
    z_BN = prefix(q_BD, 4) @ prefix(p_ND, 4).T / 0.1
    z_P = z_BN[t.pair_query_P, t.pair_passage_P]
    assert numbers["mean_similarity"].item() == pytest.approx(z_BN.mean().item(), rel=1e-6)
    assert numbers["diagonal"].item() == pytest.approx(
        ((z_P * t.pair_weight_P).sum() / 4).item(), rel=1e-6
    )


def test_query_negatives_without_relatives_are_refused():
    """Without them a query would be its own negative."""
    t = ragged_targets()
    t.query_relatives_BK = None
    with pytest.raises(ValueError, match="query_relatives"):
        build_loss(LossConfig(negatives=ALL[:2]))(unit(4, 5), unit(7, 5, seed=1), t)


def test_a_log_of_an_empty_sum_has_no_gradient():
    """nan times 0 would be nan, far from where it began."""
    x = torch.tensor([[[0.5, -torch.inf, -torch.inf]], [[1.5, -torch.inf, 2.0]]]).double()
    found = log_sum(x.requires_grad_())
    torch.testing.assert_close(found, torch.logsumexp(x, 0), rtol=1e-15, atol=0)
    torch.nn.functional.softplus(found).sum().backward()
    assert x.grad.isfinite().all() and not x.grad[:, 0, 1].any()
    sigmoid = torch.sigmoid(found.detach())[0]
    torch.testing.assert_close(x.grad[1, 0, 2], sigmoid[2], rtol=1e-12, atol=0)


# of the pairs' loss, which is multiplied by 1 - loss.teacher_weight
NO_SHARE = (
    {"symmetric": 0.5},
    {"negatives": ["query_passage", "passage_passage"]},
    {"false_negative_margin": 0.1},
    {"false_negative_ratio": 0.95},
    {"guide": "m", "false_negative_margin": 0.0},
    {"label_smoothing": 0.1},
    {"hardness": 3.0},
    {"debias": 0.1},
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": ["query_query"]}, "must hold query_passage"),
        ({"negatives": ["query_passage", "query_pasage"]}, "must be one of"),
        ({"false_negative_ratio": 0.0}, r"false_negative_ratio \(0.0\) must be in"),
        ({"guide": "", "false_negative_margin": 0.0}, "loss.guide is empty"),
        ({"guide": "m"}, "needs loss.false_negative_margin"),
        ({"teacher": "m"}, "go together"),
        ({"teacher": "m", "teacher_weight": 1.0, "guide": "n", "false_negative_margin": 0.0},
         "same model"),
        *(({"teacher": "m", "teacher_weight": 1.0} | settings, "teacher_weight=1 gives no share")
          for settings in NO_SHARE),
        ({"label_smoothing": 0.1, "debias": 0.1}, "no published form"),
        ({"kind": "sigmoid", "symmetric": 0.5}, "belongs to loss.kind=infonce"),
        ({"sigmoid_bias": -5.0}, "belongs to loss.kind=sigmoid"),
        ({"path": "fast", "backend": "triton"}, "loss.path"),
        ({"path": "eform"}, "is a way of loss.backend=triton, not of auto"),
        ({"path": "eform", "backend": "triton", "symmetric": 0.5}, "sums of rows alone"),
        ({"path": "chunk", "backend": "triton", "kind": "sigmoid"}, "sums of rows alone"),
        (
            {"path": "fused", "backend": "triton", "guide": "x", "false_negative_margin": 0.0},
            "no kernel has what loss.guide",
        ),
        ({"kind": "softmax", "positive_weight": 2.0}, "belongs to loss.kind=bce"),
        ({"kind": "bce", "no_answer": True}, "belongs to loss.kind=softmax"),
        ({"teacher_temperature": 0.1}, "belongs to a loss with a teacher"),
        ({"dims_per_step": 2}, r"dims_per_step \(2\)"),
        ({"learn_temperature": True, "temperature": 2.0}, "to be learned"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    """A setting that would silently do nothing, or something unpublished, is an error."""
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)
