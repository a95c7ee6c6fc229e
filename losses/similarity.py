"""Sums over a similarity matrix that is never whole in memory: the primitive under every loss.

Shapes: B queries, N candidates, D embedding, M Matryoshka dims, c rows of a chunk, K relatives of
a query at most, R (query, relative) cells, P (query, positive) pairs, E guide embedding.

z[m, i, j] = scale * cos(q_i, p_j) over the first dims[m] features. A chunk of queries meets all
candidates at once. Its product over the features up to dims[m] grows from segment to segment, so
that all dims cost one sweep of the inner dimension; the backward computes each chunk again and
pushes suffix sums of the dims' gradients through the same segments. The positive is never in a sum:
docs/numerics.md says why.
"""

import functools
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parents[1] / "kernels" / "infonce_triton.py"
# Elements of a chunk's matrix; half for several dims, which need one each and two more. Smaller
# ones would stay in a CPU's cache, but make the products slow (docs/numerics.md).
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
# Elements of z kept from the forward for the backward; what does not fit is computed again.
_KEPT_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
# Elements in float32 at once of pairs' scores and norms: they keep no wide copies of their inputs.
_WIDE_ELEMENTS = 2**24
_EPS = 1e-12  # as F.normalize
# exp(z) and the sum of a row of them stay in float32's range while |z| is at most this.
_BOUND = 64.0

# What can be asked for, and the field of Sums that holds it.
KINDS = {
    "row": "row_MB",
    "column": "column_MN",
    "row_total": "row_total_MB",
    "column_total": "column_total_MN",
    "softplus": "softplus_MB",
    "soft": "soft_MB",
}


RowGradient = Callable[[int, int, int, Tensor], Tensor]


@dataclass
class Limits:
    """False negatives by score: a cell counts only while its cosine is at most the limit.

    row_MB, column_MN       limits of the sums over candidates and over queries; M may be 1 for the
                            same limit at every dim
    guide_q_BE, guide_p_NE  unit-norm embeddings whose cosine is compared; None: the model's own,
                            dim by dim
    """

    row_MB: Tensor
    column_MN: Tensor | None = None
    guide_q_BE: Tensor | None = None
    guide_p_NE: Tensor | None = None


@dataclass
class Teacher:
    """Soft labels of a query: softmax over all candidates of q.p / temperature, by another model's
    unit-norm embeddings."""

    q_BE: Tensor
    p_NE: Tensor
    temperature: float


@dataclass
class Sums:
    """What was asked for, else None. Counts and entropy carry no gradient.

    row_MB, column_MN              log sum exp(z) over what counts in a row or column; -inf: nothing
    row_total_MB, column_total_MN  sum of z over the same cells
    row_count_MB, column_count_MN  number of the same cells (with the totals)
    softplus_MB                    sum of softplus(z + bias) over what counts in a row
    soft_MB                        sum over all candidates of the teacher's probability times z
    entropy_B                      of the teacher's probabilities, in nats (with soft)
    """

    row_MB: Tensor | None = None
    column_MN: Tensor | None = None
    row_total_MB: Tensor | None = None
    column_total_MN: Tensor | None = None
    softplus_MB: Tensor | None = None
    soft_MB: Tensor | None = None
    row_count_MB: Tensor | None = None
    column_count_MN: Tensor | None = None
    entropy_B: Tensor | None = None


def similarity_sums(
    q_BD: Tensor,
    p_ND: Tensor,
    scale: Tensor,
    *,
    dims: Sequence[int] | None = None,
    relatives_BK: Tensor | None = None,
    limits: Limits | None = None,
    want: Sequence[str] = ("row",),
    bias: Tensor | None = None,
    teacher: Teacher | None = None,
    chunk: int | None = None,
    backend: str = "auto",
    path: str = "auto",
    row_gradient: RowGradient | None = None,
) -> Sums:
    """Sums over the rows or columns of z, in O(chunk x N) memory, with any upstream gradient.

    q_BD, p_ND    embeddings of any float dtype; computed in float32 (float64 for float64)
    scale         1 / temperature, a scalar tensor
    dims          ascending; a prefix shorter than D is normalised again; None: D alone
    relatives_BK  columns that count in no sum but `soft`, int64, padded with -1
    want          names out of KINDS
    bias          a scalar tensor, for softplus
    chunk         queries at once; None: by size and device; it changes rounding alone
    backend       torch (chunks) | triton (kernels/, where they serve) | dense (one chunk) | auto:
                  torch, as long as no kernel has been measured on a GPU
    path          of the kernels, one of their PATHS
    row_gradient  (m, lo, hi, row_c) -> the gradient that the loss will have by the log-sums of rows
                  lo..hi at dim m, for kernels that then spare a pass; others do not ask
    Gradients reach q_BD, p_ND, scale and bias. Raises ValueError when shapes or dims disagree.
    """
    dims = [q_BD.shape[-1]] if dims is None else list(dims)
    _check(q_BD, p_ND, dims, relatives_BK)
    want = tuple(k for k in KINDS if k in want)
    totals = tuple(k for k in want if "total" in k)
    if totals and limits is None:  # linear in z: no matrix needed
        want = tuple(k for k in want if k not in totals)
        rest = Sums()
        if want:
            rest = similarity_sums(
                q_BD, p_ND, scale, dims=dims, relatives_BK=relatives_BK, want=want, bias=bias,
                teacher=teacher, chunk=chunk, backend=backend, path=path, row_gradient=row_gradient,
            )  # fmt: skip
        return replace(rest, **_totals(q_BD, p_ND, scale, dims, relatives_BK, totals))
    if backend == "triton":
        why_not = _why_no_kernel(q_BD, want, limits)
        if not why_not:
            given = q_BD, p_ND, scale, dims, relatives_BK, limits, want, bias
            return _by_kernels(*given, path, row_gradient)
        _log_once(f"similarity sums: chunks in torch instead of kernels ({why_not})")
    if backend == "dense":
        chunk = max(1, len(q_BD))
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD, p_ND, scale = q_BD.to(wide), p_ND.to(wide), scale.to(wide)
        job = _Job(dims, want, scale.detach(), limits, teacher)
        job.divide(q_BD, p_ND, relatives_BK, chunk)
        row_factor_MB = scale * prefix_factors(q_BD, dims)
        factors = row_factor_MB, prefix_factors(p_ND, dims)
        if job.is_plain and bound_of_scores(q_BD, p_ND, *factors, dims) <= _BOUND:
            values = _PlainSweep.apply(q_BD, p_ND, *factors, job)
        else:
            values = _Sweep.apply(q_BD, p_ND, *factors, bias, job)
    named = {KINDS[kind]: value for kind, value in zip(job.want, values, strict=True)}
    return Sums(**named, **job.constants)


@functools.cache
def kernels() -> ModuleType:
    """kernels/infonce_triton.py, by path: a package of that name anywhere would win over ours."""
    spec = importlib.util.spec_from_file_location("infonce_triton", KERNELS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _why_no_kernel(q_BD: Tensor, want: tuple[str, ...], limits: Limits | None) -> str:
    """Empty when the kernels can serve."""
    if q_BD.dtype == torch.float64:
        return "float64"
    others = [kind for kind in want if kind not in ("row", "column", "softplus")]
    if others:
        return f"no kernel for {', '.join(others)}"
    if limits is not None and limits.guide_q_BE is not None:
        return "no kernel compares a guide's cosines"
    if not q_BD.is_cuda and not kernels().INTERPRETING:
        return f"no kernels on {q_BD.device.type}"
    return ""


def _by_kernels(
    q_BD: Tensor,
    p_ND: Tensor,
    scale: Tensor,
    dims: list[int],
    relatives_BK: Tensor | None,
    limits: Limits | None,
    want: tuple[str, ...],
    bias: Tensor | None,
    path: str,
    row_gradient: RowGradient | None,
) -> Sums:
    row_limit_MB = column_limit_MN = None
    if limits is not None:  # the kernels' limits are on z
        row_limit_MB = limits.row_MB * scale.detach()
        if "column" in want:
            column_limit_MN = limits.column_MN * scale.detach()
    factors = scale.float() * prefix_factors(q_BD, dims), prefix_factors(p_ND, dims)
    rules = {"dims": dims, "relatives_BK": relatives_BK, "row_limit_MB": row_limit_MB, "path": path}
    found = Sums()
    if "row" in want or "column" in want:
        found.row_MB, found.column_MN = kernels().sweep(
            q_BD, p_ND, *factors, **rules, column_limit_MN=column_limit_MN,
            want_columns="column" in want, row_gradient=row_gradient,
        )  # fmt: skip
    if "softplus" in want:
        found.softplus_MB = kernels().softplus_sweep(q_BD, p_ND, *factors, bias, **rules)
    return found


def _totals(
    q_BD: Tensor,
    p_ND: Tensor,
    scale: Tensor,
    dims: list[int],
    relatives_BK: Tensor | None,
    want: tuple[str, ...],
) -> dict[str, Tensor]:
    """Fields of Sums for `row_total` and `column_total`: sums of z over all cells are products with
    sums of embeddings; the relatives' z is taken away again.
    """
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD, p_ND, scale = q_BD.to(wide), p_ND.to(wide), scale.to(wide)
        a_MB, b_MN = scale * prefix_factors(q_BD, dims), prefix_factors(p_ND, dims)
        M, B, N = len(dims), len(q_BD), len(p_ND)
        ends_M = torch.tensor(dims, device=q_BD.device)
        is_in_MD = torch.arange(q_BD.shape[1], device=q_BD.device) < ends_M[:, None]
        row_R = column_R = torch.empty(0, dtype=torch.int64, device=q_BD.device)
        if relatives_BK is not None:  # a relative named twice is still one cell
            row_R, slot_R = (relatives_BK >= 0).nonzero(as_tuple=True)
            cell_R = torch.unique(row_R * N + relatives_BK[row_R, slot_R])
            row_R, column_R = cell_R // max(1, N), cell_R % max(1, N)
        z_MR = positive_scores(q_BD, p_ND, scale, row_R, column_R, dims=dims)
        found = {}
        for axis, (x_nD, own_Mn, y_kD, other_Mk, at_R) in {
            "row": (q_BD, a_MB, p_ND, b_MN, row_R),
            "column": (p_ND, b_MN, q_BD, a_MB, column_R),
        }.items():
            if f"{axis}_total" not in want:
                continue
            n, k = (B, N) if axis == "row" else (N, B)
            total_Mn = own_Mn * ((other_Mk @ y_kD) * is_in_MD @ x_nD.T)
            found[KINDS[f"{axis}_total"]] = total_Mn.index_add(1, at_R, z_MR, alpha=-1)
            count_n = q_BD.new_full((n,), k).sub_(torch.bincount(at_R, minlength=n))
            found[KINDS[f"{axis}_total"].replace("total", "count")] = count_n.expand(M, n)
        return found


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def positive_scores(
    q_BD: Tensor,
    p_ND: Tensor,
    scale: Tensor,
    pair_query_P: Tensor,
    pair_passage_P: Tensor,
    *,
    dims: Sequence[int] | None = None,
) -> Tensor:
    """z of single cells, (M, P): the other half of the primitive. Arguments as similarity_sums."""
    dims = [q_BD.shape[-1]] if dims is None else list(dims)
    _check(q_BD, p_ND, dims, None)
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    with torch.autocast(q_BD.device.type, enabled=False):
        return _PairScores.apply(q_BD, p_ND, scale.to(wide), pair_query_P, pair_passage_P, dims)


def _pair_scores(q_PD: Tensor, p_PD: Tensor, scale: Tensor, dims: Sequence[int]) -> Tensor:
    q_PD, p_PD = q_PD.to(scale.dtype), p_PD.to(scale.dtype)
    dot_MP = _prefix_sums(q_PD * p_PD, dims)
    return dot_MP * _prefix_factors(q_PD, dims) * _prefix_factors(p_PD, dims) * scale


class _PairScores(torch.autograd.Function):
    """_pair_scores of rows of q_BD and p_ND, a share at a time. Autograd alone would keep both
    gathered in float32 until the backward, beside the workspace of the sweep."""

    @staticmethod
    def forward(ctx, q_BD, p_ND, scale, query_P, passage_P, dims):
        ctx.save_for_backward(q_BD, p_ND, scale, query_P, passage_P)
        ctx.dims, ctx.spans = dims, _spans(len(query_P), q_BD.shape[1])
        parts = [
            _pair_scores(q_BD[query_P[at]], p_ND[passage_P[at]], scale, dims) for at in ctx.spans
        ]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad_MP):
        q_BD, p_ND, scale, query_P, passage_P = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # of second order: the plain way
            inputs = [x.view_as(x) for x in (q_BD, p_ND, scale)]  # not on into what made them
            z_MP = _pair_scores(inputs[0][query_P], inputs[1][passage_P], inputs[2], ctx.dims)
            return *_grads(z_MP, inputs, needs, grad_MP), None, None, None
        inputs = q_BD, p_ND, scale
        found = [torch.zeros_like(x) if n else None for x, n in zip(inputs, needs, strict=True)]
        for at in ctx.spans:
            with torch.enable_grad(), torch.autocast(q_BD.device.type, enabled=False):
                rows = q_BD[query_P[at]], p_ND[passage_P[at]], scale
                inputs = [x.detach().requires_grad_(n) for x, n in zip(rows, needs, strict=True)]
                z_Mc = _pair_scores(*inputs, ctx.dims)
            grads = _grads(z_Mc, inputs, needs, grad_MP[:, at])
            for x, grad, to in zip(found, grads, (query_P[at], passage_P[at], None), strict=True):
                if x is not None and to is None:
                    x += grad
                elif x is not None:
                    add_rows(x, to, grad)
        return *found, None, None, None


def rows_of(x_nD: Tensor, at_P: Tensor) -> Tensor:
    """x[at], whose gradient is added as add_rows does."""
    return x_nD[at_P] if x_nD.is_cuda else x_nD.index_select(0, at_P)


def add_rows(x_nD: Tensor, to_P: Tensor, rows_PD: Tensor) -> None:
    """x[to] += rows, in place, in one order on each device: by atomics a CPU's index_put_ adds on
    several threads, CUDA's index_add_ always."""
    if x_nD.is_cuda:
        x_nD.index_put_((to_P,), rows_PD, accumulate=True)  # sorted
    else:
        x_nD.index_add_(0, to_P, rows_PD)


def _grads(
    out: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """Gradients of the inputs that need one; with a graph of their own where autograd is on."""
    wanted = [x for x, n in zip(inputs, needs, strict=True) if n]
    found = iter(torch.autograd.grad(out, wanted, upstream, create_graph=torch.is_grad_enabled()))
    return [next(found) if n else None for n in needs]


def _spans(n: int, D: int) -> list[slice]:
    """0..n in shares of about _WIDE_ELEMENTS / D rows; one at least."""
    rows = max(1, _WIDE_ELEMENTS // D)
    return [slice(lo, min(lo + rows, n)) for lo in range(0, max(1, n), rows)]


def prefix_factors(x_nD: Tensor, dims: Sequence[int]) -> Tensor:
    """1 / norm of each prefix, (M, n), float32 at least; 1 at the full width: the tower normalises
    it, or not."""
    if list(dims) == [x_nD.shape[1]] or x_nD.dtype in (torch.float32, torch.float64):
        return _prefix_factors(x_nD, dims)
    return _NarrowFactors.apply(x_nD, dims)


def _prefix_factors(x_nD: Tensor, dims: Sequence[int]) -> Tensor:
    wide = torch.promote_types(x_nD.dtype, torch.float32)
    full = x_nD.new_ones(len(x_nD), dtype=wide)
    if list(dims) == [x_nD.shape[1]]:
        return full[None]
    norm_Mn = _prefix_sums(x_nD.to(wide).square(), dims).clamp_min(_EPS**2).sqrt()
    rows = [full if d == x_nD.shape[1] else 1 / n for d, n in zip(dims, norm_Mn, strict=True)]
    return torch.stack(rows)


class _NarrowFactors(torch.autograd.Function):
    """_prefix_factors of bf16 or fp16, a share of rows at a time, without a copy in float32 that
    lives until the backward."""

    @staticmethod
    def forward(ctx, x_nD, dims):
        ctx.save_for_backward(x_nD)
        ctx.dims, ctx.spans = dims, _spans(*x_nD.shape)
        return torch.cat([_prefix_factors(x_nD[at], dims) for at in ctx.spans], 1)

    @staticmethod
    def backward(ctx, grad_Mn):
        (x_nD,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_grads(_prefix_factors(x_nD, ctx.dims), [x_nD], [True], grad_Mn), None
        grad_nD = torch.empty_like(x_nD)
        for at in ctx.spans:
            with torch.enable_grad(), torch.autocast(x_nD.device.type, enabled=False):
                x_cD = x_nD[at].detach().requires_grad_()
                factor_Mc = _prefix_factors(x_cD, ctx.dims)
            (grad_nD[at],) = _grads(factor_Mc, [x_cD], [True], grad_Mn[:, at])
        return grad_nD, None


@torch.no_grad()
def bound_of_scores(
    q_BD: Tensor, p_ND: Tensor, row_MB: Tensor, column_MN: Tensor, dims: Sequence[int]
) -> float:
    """No |z| is larger: the largest product of a scaled row's and a scaled column's norm."""
    if not len(q_BD) or not len(p_ND):
        return 0.0
    q_MB = _prefix_sums(q_BD.square(), dims).sqrt() * row_MB
    p_MN = _prefix_sums(p_ND.square(), dims).sqrt() * column_MN
    return float((q_MB.amax(1) * p_MN.amax(1)).amax())


def _prefix_sums(x_nD: Tensor, dims: Sequence[int]) -> Tensor:
    """Sums of the first dims[m] features, (M, n)."""
    return torch.stack([x_nD[:, lo:hi].sum(1) for lo, hi in _segments(dims)]).cumsum(0)


def _segments(dims: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *dims[:-1]], dims, strict=True))


def _check(q_BD: Tensor, p_ND: Tensor, dims: list[int], relatives_BK: Tensor | None) -> None:
    if q_BD.ndim != 2 or p_ND.ndim != 2 or q_BD.shape[1] != p_ND.shape[1]:
        raise ValueError(
            f"similarities: q {tuple(q_BD.shape)}, p {tuple(p_ND.shape)}; want (B, D), (N, D)"
        )
    if dims != sorted(set(dims)) or not 0 < dims[0] <= dims[-1] <= q_BD.shape[1]:
        raise ValueError(f"similarities: dims {dims} must ascend from 1 to {q_BD.shape[1]}")
    if relatives_BK is not None and len(relatives_BK) != len(q_BD):
        raise ValueError(
            f"similarities: relatives of {len(relatives_BK)} queries, want {len(q_BD)}"
        )


@dataclass
class _Job:
    """What a sweep does, and the parts of it that carry no gradient."""

    dims: list[int]
    want: tuple[str, ...]
    scale: Tensor
    limits: Limits | None
    teacher: Teacher | None
    constants: dict[str, Tensor] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)
    cells: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Log-sums alone, and none left out by score: exp(z) is all that is needed of z."""
        return self.limits is None and set(self.want) <= {"row", "column"}

    def divide(
        self, q_BD: Tensor, p_ND: Tensor, relatives_BK: Tensor | None, chunk: int | None
    ) -> None:
        """Cut the rows into chunks and sort the relatives by chunk (one device sync)."""
        B = len(q_BD)
        if chunk is None:
            elements = _CHUNK_ELEMENTS.get(q_BD.device.type, 2**22)
            if len(self.dims) > 1:
                elements //= 2
            chunk = max(128, elements // max(1, len(p_ND)))
        self.spans = [(lo, min(lo + chunk, B)) for lo in range(0, B, chunk)]
        self.cells = [None] * len(self.spans)
        if relatives_BK is not None and self.spans:
            row_R, slot_R = (relatives_BK >= 0).nonzero(as_tuple=True)
            column_R = relatives_BK[row_R, slot_R]
            edges = row_R.new_tensor([lo for lo, _ in self.spans] + [B])
            ends = torch.searchsorted(row_R, edges).tolist()
            self.cells = [
                (row_R[a:b] - lo, column_R[a:b])
                for (lo, _), a, b in zip(self.spans, ends[:-1], ends[1:], strict=True)
            ]

    def chunks(self) -> Iterator["_Chunk"]:
        for (lo, hi), cells in zip(self.spans, self.cells, strict=True):
            yield _Chunk(self, slice(lo, hi), cells)


class _Chunk:
    """The rows `at` of the matrix: what is left out there, and the teacher's opinion."""

    def __init__(self, job: _Job, at: slice, cells: tuple[Tensor, Tensor] | None):
        self.job, self.at, self.cells = job, at, cells
        limits, teacher, dtype = job.limits, job.teacher, job.scale.dtype
        self.guide_cN = self.label_cN = None
        if limits is not None and limits.guide_q_BE is not None:
            self.guide_cN = limits.guide_q_BE[at].to(dtype) @ limits.guide_p_NE.to(dtype).T
        if teacher is not None:
            score_cN = teacher.q_BE[at].to(dtype) @ teacher.p_NE.to(dtype).T
            self.label_cN = torch.softmax(score_cN / teacher.temperature, 1)

    def exponentials(self, z_cN: Tensor) -> Tensor:
        """exp(z), 0 in the relatives' cells; in place."""
        z_cN.exp_()
        if self.cells is not None:
            z_cN[self.cells] = 0.0
        return z_cN

    def leave_out(self, x_cN: Tensor, z_cN: Tensor, m: int, axis: str, value: float) -> Tensor:
        """Write `value` into the cells of x_cN that do not count in sums along `axis`; in place.

        The forward and the backward must judge the same z: computed alike, it is equal bit for bit.
        """
        if self.cells is not None:
            x_cN[self.cells] = value
        limits = self.job.limits
        if limits is not None:
            if axis == "row":
                limit = limits.row_MB[m % len(limits.row_MB), self.at, None]
            else:
                limit = limits.column_MN[m % len(limits.column_MN), None]
            if self.guide_cN is not None:
                x_cN.masked_fill_(self.guide_cN > limit, value)
            else:
                x_cN.masked_fill_(z_cN > limit * self.job.scale, value)
        return x_cN


def _planes(
    q_cD: Tensor, p_ND: Tensor, row_Mc: Tensor, column_MN: Tensor, dims: list[int]
) -> Iterator[Tensor]:
    """z of a chunk for one dim after the other, (c, N)."""
    for _, z_cN in _dots_and_planes(q_cD, p_ND, row_Mc, column_MN, dims):
        yield z_cN


def _dots_and_planes(
    q_cD: Tensor, p_ND: Tensor, row_Mc: Tensor, column_MN: Tensor, dims: list[int]
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """(dot products, z) of a chunk for one dim after the other; the dots of one dim (None) are not
    needed, those of several are overwritten by the next."""
    if len(dims) == 1:
        d = dims[0]
        p_Nd = p_ND if d == p_ND.shape[1] else p_ND[:, :d] * column_MN[0, :, None]
        yield None, (q_cD[:, :d] * row_Mc[0, :, None]) @ p_Nd.T
        return
    dot_cN = q_cD.new_zeros(len(q_cD), len(p_ND))
    for m, (lo, hi) in enumerate(_segments(dims)):
        dot_cN.addmm_(q_cD[:, lo:hi], p_ND[:, lo:hi].T)
        yield dot_cN, (dot_cN * row_Mc[m, :, None]).mul_(column_MN[m])


class _PlainSweep(torch.autograd.Function):
    """_Sweep where no score is large: exp(z) needs no reference, and rows need no matrix of their
    own in the backward, only weights on the embeddings that exp(z) multiplies."""

    @staticmethod
    def forward(ctx, q_BD, p_ND, row_MB, column_MN, job: _Job):
        M, B, N = len(job.dims), len(q_BD), len(p_ND)
        out = {kind: q_BD.new_zeros(M, N if kind == "column" else B) for kind in job.want}
        kept, room = {}, _KEPT_ELEMENTS.get(q_BD.device.type, 2**24)
        for chunk in job.chunks():
            at = chunk.at
            planes = _planes(q_BD[at], p_ND, row_MB[:, at], column_MN, job.dims)
            for m, z_cN in enumerate(planes):
                e_cN = chunk.exponentials(z_cN)
                if "row" in out:
                    out["row"][m, at] = e_cN.sum(1)
                if "column" in out:
                    out["column"][m] += e_cN.sum(0)
                if M == 1 and e_cN.numel() <= room and any(ctx.needs_input_grad):
                    kept[at.start] = e_cN
                    room -= e_cN.numel()
        # d log(sum) / dz = exp(z) / sum; nothing was summed where the sum is 0
        ctx.inverse = {kind: torch.where(x > 0, 1 / x, 0.0) for kind, x in out.items()}
        ctx.save_for_backward(q_BD, p_ND, row_MB, column_MN)
        ctx.job, ctx.kept = job, kept
        return tuple(out[kind].log() for kind in job.want)

    @staticmethod
    def backward(ctx, *upstream):
        q_BD, p_ND, row_MB, column_MN = ctx.saved_tensors
        job, dims = ctx.job, ctx.job.dims
        up = {
            kind: torch.where(ctx.inverse[kind] > 0, grad * ctx.inverse[kind], 0.0)
            for kind, grad in zip(job.want, upstream, strict=True)
            if grad is not None
        }
        row_weight_MB, column_weight_MN = up.get("row"), up.get("column")
        if row_weight_MB is None:
            row_weight_MB = torch.zeros_like(row_MB)
        grad_q_BD, grad_p_ND = torch.zeros_like(q_BD), torch.zeros_like(p_ND)
        grad_row_MB, grad_column_MN = torch.zeros_like(row_MB), torch.zeros_like(column_MN)
        for chunk in job.chunks():
            at, w_planes = chunk.at, []
            q_cD = q_BD[at]
            if len(dims) == 1:
                e_cN = ctx.kept.get(at.start)
                if e_cN is None:
                    (z_cN,) = _planes(q_cD, p_ND, row_MB[:, at], column_MN, dims)
                    e_cN = chunk.exponentials(z_cN)
                weight_c = row_weight_MB[0, at]
                if column_weight_MN is not None:
                    e_cN = (weight_c[:, None] + column_weight_MN[0]).mul_(e_cN)
                    weight_c = None
                _emit_one(q_cD, p_ND, row_MB[0, at], column_MN[0], dims[0], e_cN, weight_c,
                          grad_q_BD[at], grad_p_ND, grad_row_MB[0, at])  # fmt: skip
                continue
            for m, (dot_cN, z_cN) in enumerate(
                _dots_and_planes(q_cD, p_ND, row_MB[:, at], column_MN, dims)
            ):
                w_cN, row_c = chunk.exponentials(z_cN), row_MB[m, at]
                if column_weight_MN is None:
                    w_cN.mul_((row_weight_MB[m, at] * row_c)[:, None]).mul_(column_MN[m])
                else:
                    weight_cN = row_weight_MB[m, at, None] + column_weight_MN[m]
                    w_cN.mul_(weight_cN).mul_(row_c[:, None]).mul_(column_MN[m])
                gz_cN = dot_cN * w_cN  # G z = dot W
                grad_row_MB[m, at] = gz_cN.sum(1) / row_c
                grad_column_MN[m] += gz_cN.sum(0)
                w_planes.append(w_cN)
            _emit_suffixes(q_cD, p_ND, dims, w_planes, grad_q_BD[at], grad_p_ND)
        if len(dims) == 1:
            grad_column_MN[0] = (grad_p_ND * p_ND).sum(1) / column_MN[0]
        else:
            grad_column_MN /= column_MN
        return grad_q_BD, grad_p_ND, grad_row_MB, grad_column_MN, None


class _Sweep(torch.autograd.Function):
    """One pass over the chunks forward, one backward. z = row_factor * column_factor * dot.

    With G = dL/dz, W = row_factor * column_factor * G of each dim, and suffix sums over the dims
    from a segment's own upwards: dL/dq[segment] = W p[segment], dL/dp[segment] = W^T q[segment],
    dL/drow_factor = sum_j G z / row_factor, and so for columns.
    """

    @staticmethod
    def forward(ctx, q_BD, p_ND, row_MB, column_MN, bias, job: _Job):
        M, B, N = len(job.dims), len(q_BD), len(p_ND)
        out = {kind: q_BD.new_zeros(M, N if kind.startswith("column") else B) for kind in job.want}
        top_MN = None
        if "column" in job.want:
            top_MN = q_BD.new_full((M, N), -math.inf)
        counts = {kind: torch.zeros_like(out[kind]) for kind in job.want if "total" in kind}
        entropy_B = q_BD.new_zeros(B)
        kept, room = {}, _KEPT_ELEMENTS.get(q_BD.device.type, 2**24)
        for chunk in job.chunks():
            at = chunk.at
            if chunk.label_cN is not None:
                entropy_B[at] = torch.special.entr(chunk.label_cN).sum(1)
            planes = _planes(q_BD[at], p_ND, row_MB[:, at], column_MN, job.dims)
            for m, z_cN in enumerate(planes):
                if z_cN.numel() <= room and any(ctx.needs_input_grad):
                    kept[at.start, m] = z_cN
                    room -= z_cN.numel()
                if "soft" in out:
                    out["soft"][m, at] = (chunk.label_cN * z_cN).sum(1)
                if "softplus" in out:
                    x_cN = F.softplus(z_cN + bias, threshold=40)
                    out["softplus"][m, at] = chunk.leave_out(x_cN, z_cN, m, "row", 0.0).sum(1)
                for axis, dim in (("row", 1), ("column", 0)):
                    if f"{axis}_total" in out:
                        kept_cN = chunk.leave_out(torch.ones_like(z_cN), z_cN, m, axis, 0.0)
                        place = (m, at) if axis == "row" else (m,)
                        counts[f"{axis}_total"][place] += kept_cN.sum(dim)
                        out[f"{axis}_total"][place] += kept_cN.mul_(z_cN).sum(dim)
                if "column" in out:
                    x_cN = chunk.leave_out(z_cN.clone(), z_cN, m, "column", -math.inf)
                    _add_exp(out["column"][m], top_MN[m], x_cN)
                if "row" in out:
                    x_cN = chunk.leave_out(z_cN.clone(), z_cN, m, "row", -math.inf)
                    top_c = _finite(x_cN.amax(1))
                    sum_c = x_cN.sub_(top_c[:, None]).exp_().sum(1)
                    out["row"][m, at] = sum_c.log_().add_(top_c)
        if "column" in out:
            out["column"].log_().add_(_finite(top_MN))
        if job.teacher is not None:
            job.constants["entropy_B"] = entropy_B
        for kind, count in counts.items():
            job.constants[KINDS[kind].replace("total", "count")] = count
        ctx.save_for_backward(q_BD, p_ND, row_MB, column_MN, bias)
        ctx.job, ctx.kept = job, kept
        ctx.log_sums = {k: _finite(out[k]) for k in ("row", "column") if k in out}
        return tuple(out[kind] for kind in job.want)

    @staticmethod
    def backward(ctx, *upstream):
        q_BD, p_ND, row_MB, column_MN, bias = ctx.saved_tensors
        job, dims = ctx.job, ctx.job.dims
        up = {kind: grad for kind, grad in zip(job.want, upstream, strict=True) if grad is not None}
        grad_q_BD, grad_p_ND = torch.zeros_like(q_BD), torch.zeros_like(p_ND)
        grad_row_MB, grad_column_MN = torch.zeros_like(row_MB), torch.zeros_like(column_MN)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for chunk in job.chunks():
            at, w_planes = chunk.at, []
            q_cD = q_BD[at]
            planes = [ctx.kept.get((at.start, m)) for m in range(len(dims))]
            if any(z_cN is None for z_cN in planes):
                planes = _planes(q_cD, p_ND, row_MB[:, at], column_MN, dims)
            for m, z_cN in enumerate(planes):
                g_cN = _gradient(chunk, m, z_cN, up, ctx.log_sums, bias, grad_bias)
                if len(dims) == 1:
                    w_planes.append(g_cN)
                    break
                gz_cN = z_cN * g_cN
                grad_row_MB[m, at] = gz_cN.sum(1) / row_MB[m, at]
                grad_column_MN[m] += gz_cN.sum(0)
                w_planes.append(g_cN.mul_(row_MB[m, at, None]).mul_(column_MN[m]))
            if len(dims) == 1:
                _emit_one(q_cD, p_ND, row_MB[0, at], column_MN[0], dims[0], w_planes.pop(), None,
                          grad_q_BD[at], grad_p_ND, grad_row_MB[0, at])  # fmt: skip
                continue
            _emit_suffixes(q_cD, p_ND, dims, w_planes, grad_q_BD[at], grad_p_ND)
        if len(dims) == 1:
            grad_column_MN[0] = (grad_p_ND * p_ND).sum(1) / column_MN[0]
        else:
            grad_column_MN /= column_MN
        return grad_q_BD, grad_p_ND, grad_row_MB, grad_column_MN, grad_bias, None


def _gradient(
    chunk: _Chunk,
    m: int,
    z_cN: Tensor,
    up: dict[str, Tensor],
    log_sums: dict[str, Tensor],
    bias: Tensor | None,
    grad_bias: Tensor | None,
) -> Tensor:
    """G = dL/dz of a chunk at one dim, (c, N), from the sums' gradients; adds to grad_bias."""
    total_cN = None
    for kind, grad in up.items():
        axis = "column" if kind.startswith("column") else "row"
        grad = grad[m] if axis == "column" else grad[m, chunk.at, None]
        if kind == "soft":
            g_cN = chunk.label_cN * grad
        else:
            if kind in log_sums:
                base = log_sums[kind][m] if axis == "column" else log_sums[kind][m, chunk.at, None]
                g_cN = (z_cN - base).exp_().mul_(grad)
            elif kind == "softplus":
                g_cN = torch.sigmoid(z_cN + bias).mul_(grad)
            else:
                g_cN = grad.expand_as(z_cN).clone()
            chunk.leave_out(g_cN, z_cN, m, axis, 0.0)
            if kind == "softplus":
                grad_bias += g_cN.sum()
        total_cN = g_cN if total_cN is None else total_cN.add_(g_cN)
    return torch.zeros_like(z_cN) if total_cN is None else total_cN


def _emit_one(
    q_cD, p_ND, row_c, column_N, d, g_cN, weight_c, grad_q_cD, grad_p_ND, grad_row_c
) -> None:
    """The gradients of a single dim, in place: the factors, and weights on the rows of G where
    there are any, meet embeddings, not matrices."""
    is_full = d == p_ND.shape[1]
    p_Nd = p_ND if is_full else p_ND[:, :d] * column_N[:, None]
    grad_cd = g_cN @ p_Nd
    factor_c = row_c
    if weight_c is not None:
        grad_cd.mul_(weight_c[:, None])
        factor_c = row_c * weight_c
    grad_row_c += (grad_cd * q_cD[:, :d]).sum(1)
    grad_q_cD[:, :d] = grad_cd.mul_(row_c[:, None])
    scaled_cd = q_cD[:, :d] * factor_c[:, None]
    if is_full:
        grad_p_ND.addmm_(g_cN.T, scaled_cd)
    else:
        grad_p_ND[:, :d] += (g_cN.T @ scaled_cd).mul_(column_N[:, None])


def _emit_suffixes(q_cD, p_ND, dims, w_planes, grad_q_cD, grad_p_ND) -> None:
    """The gradients of several dims, in place; a segment belongs to its own dim and all wider."""
    suffix_cN = None
    for lo, hi in reversed(_segments(dims)):
        w_cN = w_planes.pop()
        suffix_cN = w_cN if suffix_cN is None else suffix_cN.add_(w_cN)
        torch.mm(suffix_cN, p_ND[:, lo:hi], out=grad_q_cD[:, lo:hi])
        grad_p_ND[:, lo:hi].addmm_(suffix_cN.T, q_cD[:, lo:hi])


def _add_exp(sum_N: Tensor, top_N: Tensor, x_cN: Tensor) -> None:
    """Add exp(x) of a chunk to running sums kept relative to the running maximum; in place."""
    new_N = torch.maximum(top_N, x_cN.amax(0))
    base_N = _finite(new_N)
    sum_N.mul_((top_N - base_N).exp_()).add_(x_cN.sub_(base_N).exp_().sum(0))
    top_N.copy_(new_N)


def _finite(x: Tensor) -> Tensor:
    """-inf (the log-sum of nothing) as 0, so that x - x is no nan."""
    return x.masked_fill(x == -math.inf, 0.0)
