"""The chunked sums against whole matrices and autograd in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from conf.schema import LossConfig
from losses import similarity
from losses.build import build_loss
from losses.infonce import Targets
from losses.similarity import KINDS, Limits, Teacher, positive_scores, similarity_sums


def unit(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1).to(dtype)


def matrix(q_BD, p_ND, scale, dim):
    """z by autograd, whole."""
    if dim < q_BD.shape[1]:
        q_BD, p_ND = F.normalize(q_BD[:, :dim], dim=1), F.normalize(p_ND[:, :dim], dim=1)
    return q_BD @ p_ND.T * scale


def counted(relatives_BK, N):
    keep_BN = torch.ones(len(relatives_BK), N, dtype=torch.bool)
    for row, columns in zip(keep_BN, relatives_BK.tolist(), strict=True):
        row[[c for c in columns if c >= 0]] = False
    return keep_BN


def by_matrices(q_BD, p_ND, scale, dims, bias, labels_BN, keep_row, keep_column):
    """Every kind of sum from whole matrices; keep_row and keep_column: (m, z) -> bool matrix."""
    out = {kind: [] for kind in KINDS}
    for m, dim in enumerate(dims):
        z_BN = matrix(q_BD, p_ND, scale, dim)
        row, column = keep_row(m, z_BN.detach()), keep_column(m, z_BN.detach())
        out["row"].append(z_BN.masked_fill(~row, -math.inf).logsumexp(1))
        out["column"].append(z_BN.masked_fill(~column, -math.inf).logsumexp(0))
        out["row_total"].append((z_BN * row).sum(1))
        out["column_total"].append((z_BN * column).sum(0))
        out["softplus"].append((F.softplus(z_BN + bias, threshold=60) * row).sum(1))
        out["soft"].append((labels_BN * z_BN).sum(1))
    return {kind: torch.stack(values) for kind, values in out.items()}


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("limited", [None, "own", "guide"])
@pytest.mark.parametrize("dims", [[12], [5], [3, 7, 12], [2, 9]])
def test_sums_and_any_upstream_gradient_equal_the_matrix(dims, limited, chunk):
    """Ragged chunks, segments, masks and factors each have an index to get wrong."""
    B, N, D = 7, 11, 12
    q_BD, p_ND = unit(B, D).requires_grad_(), unit(N, D, seed=1).requires_grad_()
    scale = torch.tensor(13.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    relatives_BK = torch.randint(-1, N, (B, 3), generator=torch.Generator().manual_seed(2))
    teacher = Teacher(unit(B, 4, seed=3), unit(N, 4, seed=4), 0.3)
    labels_BN = torch.softmax(teacher.q_BE @ teacher.p_NE.T / 0.3, 1)
    keep_BN = counted(relatives_BK, N)
    row_MB = unit(len(dims), B, seed=5) * 0.8 + 0.2
    column_MN = unit(len(dims), N, seed=6) * 0.8 + 0.2
    limits = None
    if limited == "own":
        limits = Limits(row_MB, column_MN)
    elif limited == "guide":
        limits = Limits(row_MB[:1], column_MN[:1], unit(B, 3, seed=7), unit(N, 3, seed=8))

    def keep(m, z_BN, axis):
        if limits is None:
            return keep_BN
        if limited == "own":
            cosine = z_BN / scale.detach()
        else:
            cosine = limits.guide_q_BE @ limits.guide_p_NE.T
        at = m if limited == "own" else 0
        bound = row_MB[at][:, None] if axis == "row" else column_MN[at][None]
        return keep_BN & (cosine <= bound)

    expected = by_matrices(
        q_BD, p_ND, scale, dims, bias, labels_BN,
        lambda m, z: keep(m, z, "row"), lambda m, z: keep(m, z, "column"),
    )  # fmt: skip
    found = similarity_sums(
        q_BD, p_ND, scale, dims=dims, relatives_BK=relatives_BK, limits=limits, want=tuple(KINDS),
        bias=bias, teacher=teacher, chunk=chunk,
    )  # fmt: skip
    for kind, name in KINDS.items():
        value = getattr(found, name)
        torch.testing.assert_close(value, expected[kind], rtol=1e-10, atol=1e-12, msg=kind)
        weight = unit(*value.shape, seed=9)
        # an upstream gradient of -inf cells is 0 in both, but -inf * weight is not a number
        losses = [torch.where(v.isinf(), 0, v * weight).sum() for v in (value, expected[kind])]
        inputs = (q_BD, p_ND, scale, bias) if kind == "softplus" else (q_BD, p_ND, scale)
        got = torch.autograd.grad(losses[0], inputs, retain_graph=True)
        want = torch.autograd.grad(losses[1], inputs, retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12, msg=kind)
    for m, dim in enumerate(dims):
        kept = keep(m, matrix(q_BD, p_ND, scale, dim).detach(), "row")
        assert torch.equal(found.row_count_MB[m], kept.sum(1).double())
    entropy_B = -(labels_BN * labels_BN.log()).sum(1)
    torch.testing.assert_close(found.entropy_B, entropy_B, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [13.0, 130.0], ids=["small", "large"])
@pytest.mark.parametrize("want", [("row",), ("column",), ("row", "column")], ids="-".join)
@pytest.mark.parametrize("dims", [[12], [5], [3, 7, 12]])
def test_small_and_large_scores_take_different_ways_to_the_same_sums(dims, want, scale):
    """Small scores need no reference and keep exp(z); large ones would overflow without one."""
    q_BD, p_ND = unit(7, 12).requires_grad_(), unit(11, 12, seed=1).requires_grad_()
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    relatives_BK = torch.randint(-1, 11, (7, 3), generator=torch.Generator().manual_seed(2))
    keep_BN = counted(relatives_BK, 11)
    nothing, zero = torch.zeros(7, 11, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    expected = by_matrices(
        q_BD, p_ND, scale, dims, zero, nothing, lambda m, z: keep_BN, lambda m, z: keep_BN
    )
    for chunk in (2, None):
        found = similarity_sums(
            q_BD, p_ND, scale, dims=dims, relatives_BK=relatives_BK, want=want, chunk=chunk
        )
        ways = {type(getattr(found, KINDS[kind]).grad_fn).__name__ for kind in want}
        assert ways == {"_PlainSweepBackward" if scale < 64 else "_SweepBackward"}
        losses = [0.0, 0.0]
        for kind in want:
            values = getattr(found, KINDS[kind]), expected[kind]
            torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
            weight = unit(*values[0].shape, seed=9)
            losses = [
                loss + torch.where(v.isinf(), 0, v * weight).sum()
                for loss, v in zip(losses, values, strict=True)
            ]
        got = torch.autograd.grad(losses[0], (q_BD, p_ND, scale))
        for g, e in zip(
            got, torch.autograd.grad(losses[1], (q_BD, p_ND, scale), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_what_is_kept_from_the_forward_changes_nothing(monkeypatch):
    """The backward reads kept chunks and computes the others again: both must be the same z."""
    q_BD, p_ND = unit(9, 6).requires_grad_(), unit(8, 6, seed=1).requires_grad_()
    for scale, dims in ((5.0, [6]), (90.0, [6]), (90.0, [2, 6])):
        gradients = []
        for elements in (0, 40, 10_000):
            monkeypatch.setitem(similarity._KEPT_ELEMENTS, "cpu", elements)
            sums = similarity_sums(q_BD, p_ND, torch.tensor(scale), dims=dims, chunk=2)
            gradients.append(torch.autograd.grad(sums.row_MB.square().sum(), (q_BD, p_ND)))
        for other in gradients[1:]:
            for g, first in zip(other, gradients[0], strict=True):
                assert torch.equal(g, first)


def test_single_cells_equal_the_matrix():
    """positive_scores is the other half: the same z, cell by cell."""
    q_BD, p_ND = unit(4, 6), unit(5, 6, seed=1)
    rows, columns = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 4])
    z_MP = positive_scores(q_BD, p_ND, torch.tensor(7.0), rows, columns, dims=[2, 6])
    for z_P, dim in zip(z_MP, (2, 6), strict=True):
        torch.testing.assert_close(z_P, matrix(q_BD, p_ND, 7.0, dim)[rows, columns])


def plain_pairs(q_BD, p_ND, scale, rows, columns, dims):
    """positive_scores by autograd, everything kept."""
    q_PD, p_PD = q_BD[rows].to(scale.dtype), p_ND[columns].to(scale.dtype)
    found = []
    for d in dims:
        z_P = (q_PD[:, :d] * p_PD[:, :d]).sum(1) * scale
        for x_PD in (q_PD, p_PD) if d < q_BD.shape[1] else ():
            z_P = z_P / x_PD[:, :d].norm(dim=1)
        found.append(z_P)
    return torch.stack(found)


@pytest.mark.parametrize("dims", [[12], [5], [3, 7, 12]])
@pytest.mark.parametrize("share", [24, 2**24])
def test_scores_of_pairs_are_differentiable_twice(dims, share, monkeypatch):
    """They keep their inputs alone and are computed again, pieces of two pairs or all at once; a
    graph may be used again, and by another gradient."""
    monkeypatch.setattr(similarity, "_WIDE_ELEMENTS", share)
    leaves = [unit(4, 12), unit(5, 12, seed=1), torch.tensor(7.0, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in leaves]
    rows, columns = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([4, 0, 4, 4, 1])
    found = []
    for z_MP in (
        positive_scores(*leaves, rows, columns, dims=dims),
        plain_pairs(*leaves, rows, columns, dims),
    ):
        first = torch.autograd.grad(z_MP.sin().sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(z_MP.sin().sum(), leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        graph = torch.autograd.grad(z_MP.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), leaves)
        found.append([z_MP, *first, *graph, *second])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("passages_of", [lambda x: x, lambda x: torch.sin(2 * x)])
def test_second_order_gradients_stop_at_the_inputs(passages_of):
    """Passages made of the queries: their part of the gradient must not count twice."""
    rows, columns, scale = torch.tensor([0, 3, 3]), torch.tensor([1, 0, 2]), torch.tensor(7.0)
    found = []
    for pairs in (lambda *a: positive_scores(*a[:-1], dims=a[-1]), plain_pairs):
        q_BD = unit(4, 12).requires_grad_()
        z_MP = pairs(q_BD, passages_of(q_BD), scale.double(), rows, columns, [5, 12])
        found.append(*torch.autograd.grad(z_MP.sin().sum(), q_BD, create_graph=True))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_gradients_of_a_passage_of_many_pairs_are_the_same_bits_every_time():
    """On two threads a CPU adds rows of an index_put_ by atomics, from 32,768 elements on."""
    threads = torch.get_num_threads()
    q_BD = unit(512, 384, dtype=torch.float32)
    p_ND = unit(100, 384, seed=1, dtype=torch.float32)
    at = torch.arange(512)
    rules = {"relatives_BK": (at % 100)[:, None], "query_relatives_BK": at[:, None]}
    targets = Targets(at, at % 100, torch.ones(512), num_examples=512, **rules)
    loss_fn = build_loss(LossConfig(negatives=["query_passage", "passage_passage"]))
    try:
        torch.set_num_threads(2)
        found = []
        for _ in range(20):
            leaves = [x.clone().requires_grad_() for x in (q_BD, p_ND)]
            loss_fn(*leaves, targets)[0].backward()
            found.append([x.grad for x in leaves])
    finally:
        torch.set_num_threads(threads)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


@pytest.mark.parametrize("dims", [[64], [16, 32, 64]])
def test_no_wide_copy_of_narrow_pairs_outlives_the_forward(dims):
    """Beside a sweep of 65,536 x 768 each would be 192 MiB; the gradients keep every bit."""
    q_BD, p_ND = (unit(8, 64, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (0, 1))
    scale, at, kept = torch.tensor(20.0), torch.arange(8), []

    def loss(pairs, factors):
        z_MP = pairs(q_BD, p_ND, scale, at, at, dims)
        return z_MP.sum() + factors(q_BD, dims).square().sum()

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = loss(lambda *a: positive_scores(*a[:-1], dims=a[-1]), similarity.prefix_factors)
    assert kept and not [x for x in kept if x.dtype == torch.float32 and x.numel() >= 8 * 16]

    def plain(q_BD, p_ND, scale, rows, columns, dims):
        return similarity._pair_scores(q_BD[rows], p_ND[columns], scale, dims)

    wanted = loss(plain, lambda x_nD, dims: similarity._prefix_factors(x_nD.float(), dims))
    assert torch.equal(found, wanted)
    grads = (torch.autograd.grad(x, (q_BD, p_ND)) for x in (found, wanted))
    for ours, other in zip(*grads, strict=True):
        assert torch.equal(ours, other)


def test_wide_scores_neither_overflow_nor_vanish():
    """At temperature .01 z spans 200: a fixed maximum would give exp(-200) = 0 and log 0."""
    q_BD = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    p_ND = torch.tensor([[-1.0, 0.0], [-0.9, math.sqrt(1 - 0.81)]])
    sums = similarity_sums(q_BD, p_ND, torch.tensor(100.0), want=("row", "column"), chunk=1)
    z_BN = q_BD.double() @ p_ND.double().T * 100
    torch.testing.assert_close(sums.row_MB[0].double(), z_BN.logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.column_MN[0].double(), z_BN.logsumexp(0), rtol=1e-6, atol=0)


def test_no_query_and_zero_vectors_are_fine():
    """A rank without queries, and a prefix of zeros: no nan, gradient 0."""
    p_ND = unit(3, 4).requires_grad_()
    sums = similarity_sums(unit(0, 4), p_ND, torch.tensor(2.0), dims=[2, 4], want=("row", "column"))
    assert sums.row_MB.shape == (2, 0) and (sums.column_MN == -math.inf).all()
    q_BD = torch.tensor([[0.0, 0.0, 0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    sums = similarity_sums(q_BD, p_ND, torch.tensor(2.0), dims=[2, 4])
    sums.row_MB.sum().backward()
    assert q_BD.grad.isfinite().all() and p_ND.grad.isfinite().all()


@pytest.mark.parametrize(
    ("q", "p", "options", "message"),
    [
        (unit(4, 5), unit(7, 6), {}, r"q \(4, 5\), p \(7, 6\)"),
        (unit(4, 5), unit(7, 5), {"dims": [3, 2]}, r"dims \[3, 2\] must ascend"),
        (unit(4, 5), unit(7, 5), {"dims": [6]}, r"dims \[6\] must ascend"),
        (unit(4, 5), unit(7, 5), {"relatives_BK": torch.zeros(3, 1)}, "relatives of 3 queries"),
    ],
)
def test_shapes_that_disagree_are_named(q, p, options, message):
    """The message shows what came."""
    with pytest.raises(ValueError, match=message):
        similarity_sums(q, p, torch.tensor(1.0), **options)
