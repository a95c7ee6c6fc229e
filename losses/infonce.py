"""InfoNCE with every option at any size: a few lines on sums that never need a whole matrix.

Shapes: B queries of this rank, A queries of all ranks, N candidate passages of all ranks (positives
and negatives of all queries), D embedding, P (query, positive) pairs, K known relatives of a query
at most, M Matryoshka dims, E guide embedding.

With z = cosine / temperature, b the query and j the positive passage of a pair, N_b the passages
that are no relatives of b, A_b the queries that are none, and per Matryoshka dim:

    ln   = log( sum_{n in N_b} e^{z(b,n)}        query_passage    van den Oord et al. 2018, eq. 4
              + sum_{a in A_b} e^{z(b,a)}        query_query      Li et al. 2023 (GTE), eq. 3;
              + sum_{n in N_b} e^{z(j,n)}        passage_passage  Zhang et al. 2025 (Qwen3
              + sum_{a: j in N_a} e^{z(a,j)} )   passage_query    Embedding), eq. 1
    pair = softplus(ln - z(b,j))  =  -log( e^{z(b,j)} / (e^{z(b,j)} + e^{ln}) )
    loss = sum over pairs of weight * pair / examples of all ranks

symmetric        (1 - s) pair + s softplus(lc - z(b,j)), lc = log sum_{a: j in N_a} e^{z(a,j)}
false negatives  a cell is left out where its cosine > limit; limit = c + margin, ratio * c, or the
                 smaller, c the cosine of b's best positive (for passage_query and lc: of j's best
                 query), detached
                 (Qwen3 eq. 1: margin .1; Moreira et al. 2024, NV-Retriever, sec. 3: ratio .95).
                 With a guide all three cosines are the guide's (Solatorio 2024, GISTEmbed, sec. 3)
hardness h       negatives enter as z + h sg(cosine), sg without gradient (Lan et al. 2025, LLaVE)
debias t         e^ln becomes max((e^ln - t n e^{z(b,j)}) / (1 - t), n e^{-1/temperature}), n cells
                 (Chuang et al. 2020, eq. 8)
label_smoothing  + e (z(b,j) - mean of z over the pair's positive and negatives)
                 (Szegedy et al. 2016, sec. 7)
teacher          (1 - w) loss + w mean_b KL(softmax(teacher cosine / teacher temperature) ||
                 softmax(z(b, .))) over all candidates

losses/specification.py has the same as whole matrices; losses/check.py compares the two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import LossConfig
from losses.rerank import GroupTargets
from losses.similarity import (
    Limits,
    RowGradient,
    Sums,
    Teacher,
    positive_scores,
    prefix_factors,
    rows_of,
    similarity_sums,
)
from runtime.distributed import SINGLE, Ranks


@dataclass
class Targets:
    """Which candidates answer which query. Columns number the candidates of all ranks.

    pair_query_P    row of q_BD, int64; a query with several positives owns several pairs
    pair_passage_P  column of p_ND that answers it, int64
    pair_weight_P   share of the pair in the sum, float32: 1 / positives of its example
    relatives_BK    columns that are never negatives of the query (all its known positives, texts
                    equal to it or to them), int64, padded with -1
    num_examples    examples of all ranks: the divisor of the mean
    step            0-based, for a seeded sample of dims
    query_offset    this rank's first query among all
    num_queries     of all ranks; None: B
    query_relatives_BK  queries of all ranks that are never negatives of the query (itself, those
                    that share an answer), int64, padded with -1; for query_query
    guide_query_AE, guide_passage_NE  unit-norm embeddings of the guide or teacher
    scored          every query's own passages as a group, with a teacher's scores; group_P is the
                    row of q_BD, scored_passage_P the column
    """

    pair_query_P: Tensor
    pair_passage_P: Tensor
    pair_weight_P: Tensor
    relatives_BK: Tensor
    num_examples: int
    step: int = 0
    query_offset: int = 0
    num_queries: int | None = None
    query_relatives_BK: Tensor | None = None
    guide_query_AE: Tensor | None = None
    guide_passage_NE: Tensor | None = None
    scored: GroupTargets | None = None
    scored_passage_P: Tensor | None = None


class InfoNCE(nn.Module):
    """The loss of the module's text, in O(chunk x N) memory, over one or several Matryoshka dims.

    The dims' losses are averaged by weight: the result stays in nats whatever the weights. Source
    of the prefix form: Kusupati et al. 2022, eq. 1; prefixes are normalised again.
    """

    def __init__(self, c: LossConfig, seed: int = 0, operands: torch.dtype | None = None):
        """operands  type that embeddings are rounded to before they meet; None: as they come"""
        super().__init__()
        self.c, self.seed, self.operands = c, seed, operands
        self.bounds = (math.log(c.temperature_min), math.log(c.temperature_max))
        log_temperature = torch.tensor(math.log(c.temperature))
        if c.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> Tensor:
        if isinstance(self.log_temperature, nn.Parameter):
            return self.log_temperature.clamp(*self.bounds).exp()
        return self.log_temperature.exp()

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """Bring a learned temperature back that an optimiser's step took past a bound: out there
        `clamp` has no gradient, so that it would never return by itself."""
        if isinstance(self.log_temperature, nn.Parameter):
            self.log_temperature.clamp_(*self.bounds)

    def rounded(self, x_nD: Tensor) -> Tensor:
        """Embeddings in the type in which they meet."""
        return x_nD if self.operands is None else x_nD.to(self.operands)

    def forward(
        self, q_BD: Tensor, p_ND: Tensor, targets: Targets, ranks: Ranks = SINGLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss in nats and of {"diagonal", "mean_similarity"}.

        q_BD are this rank's queries, p_ND the candidates of all ranks. The sum of the shares over
        the ranks is the value for the whole batch. Diagonal and mean similarity are scores divided
        by temperature, of the pairs and of all cells, at the widest dim.
        """
        dims, weight_M = dims_of_step(self.c, q_BD.shape[1], self.seed, targets.step)
        scale = 1 / self.temperature
        q_BD, p_ND = self.rounded(q_BD), self.rounded(p_ND)  # positives and negatives alike
        negatives = _Negatives(self.c, q_BD, p_ND, targets, ranks, dims, scale)
        pair_MP = negatives.loss_of_pairs()
        loss_M = (pair_MP * targets.pair_weight_P).sum(1) / targets.num_examples
        if self.c.teacher_weight:
            w = self.c.teacher_weight
            loss_M = (1 - w) * loss_M + w * _divergence(self.c, q_BD, p_ND, targets, dims, scale)
        numbers = mean_scores(q_BD, p_ND, targets, max([*self.c.dims, *dims]), scale)
        return (loss_M * weight_M.to(loss_M)).sum(), numbers


def dims_of_step(c: LossConfig, width: int, seed: int, step: int) -> tuple[list[int], Tensor]:
    """Ascending dims of a step and the weight of each in the loss.

    A sample (loss.dims_per_step of M) is drawn from (seed, step) and weighted by M / its size, so
    that its expectation is the loss over all dims.
    """
    weights = c.dim_weights or [1.0] * len(c.dims)
    pairs = sorted(zip(c.dims, weights, strict=True)) or [(width, 1.0)]
    total = sum(w for _, w in pairs)
    if 0 < c.dims_per_step < len(pairs):
        rng = np.random.default_rng([seed, step, len(pairs)])
        chosen = sorted(rng.choice(len(pairs), c.dims_per_step, replace=False).tolist())
        total *= len(chosen) / len(pairs)
        pairs = [pairs[i] for i in chosen]
    return [d for d, _ in pairs], torch.tensor([w / total for _, w in pairs], dtype=torch.float64)


@torch.no_grad()
def mean_scores(
    q_BD: Tensor, p_ND: Tensor, targets: Targets, dim: int, scale: Tensor
) -> dict[str, Tensor]:
    """Shares of the mean score of the pairs and of all cells (by sums of vectors, not of cells)."""
    pairs = targets.pair_query_P, targets.pair_passage_P
    z_P = positive_scores(q_BD, p_ND, scale, *pairs, dims=[dim])[0]
    q_D = (q_BD[:, :dim] * prefix_factors(q_BD, [dim])[0, :, None]).sum(0)
    p_D = (p_ND[:, :dim] * prefix_factors(p_ND, [dim])[0, :, None]).sum(0)
    cells = (targets.num_queries or len(q_BD)) * len(p_ND)
    return {
        "diagonal": (z_P * targets.pair_weight_P).sum() / targets.num_examples,
        "mean_similarity": (q_D @ p_D) * scale / cells,
    }


class _Negatives:
    """Everything a pair is told from, as sums; built once a step."""

    def __init__(
        self,
        c: LossConfig,
        q_BD: Tensor,
        p_ND: Tensor,
        targets: Targets,
        ranks: Ranks,
        dims: list[int],
        scale: Tensor,
    ):
        self.c, self.q_BD, self.p_ND, self.t, self.ranks = c, q_BD, p_ND, targets, ranks
        self.dims, self.scale = dims, scale
        pairs = targets.pair_query_P, targets.pair_passage_P
        self.z_MP = positive_scores(q_BD, p_ND, scale, *pairs, dims=dims)
        self.wants_totals = bool(c.label_smoothing or c.debias)
        self.wants_columns = bool(c.symmetric) or "passage_query" in c.negatives
        self._find_limits()
        # z + h sg(cosine): summed at scale + h, with the gradient that scale alone would give
        self.steeper, self.shrink = scale, None
        if c.hardness:
            self.shrink = (scale / (scale + c.hardness)).detach()
            self.steeper = _ScaleGradient.apply(scale, 1 / self.shrink) + c.hardness

    def loss_of_pairs(self) -> Tensor:
        """(M, P) nats."""
        c, t = self.c, self.t
        rows, columns = self._query_passage()
        parts = [_at(rows, t.pair_query_P)]
        if "query_query" in c.negatives:
            parts.append(_at(self._query_query(), t.pair_query_P))
        if "passage_passage" in c.negatives:
            parts.append(self._passage_passage())
        if "passage_query" in c.negatives:
            parts.append(_at(columns, t.pair_passage_P))
        loss_MP = self._loss(parts)
        if c.symmetric:
            other_MP = self._loss([_at(columns, t.pair_passage_P)])
            loss_MP = (1 - c.symmetric) * loss_MP + c.symmetric * other_MP
        return loss_MP

    def _loss(self, parts: list["_Part"]) -> Tensor:
        """softplus(ln - z) of each pair against the union of the parts, with its corrections."""
        c, z_MP = self.c, self.z_MP
        ln_MP = parts[0].log_MP
        if len(parts) > 1:
            ln_MP = log_sum(torch.stack([p.log_MP for p in parts]))
        count_MP = sum(p.count_MP for p in parts) if self.wants_totals else None
        if c.debias:
            ln_MP = _debiased(ln_MP, z_MP, count_MP, c.debias, self.scale)
        loss_MP = F.softplus(ln_MP - z_MP, threshold=40)  # 20, the default: 2e-9 off
        if c.label_smoothing:
            total_MP = z_MP + sum(p.total_MP for p in parts)
            loss_MP = loss_MP + c.label_smoothing * (z_MP - total_MP / (1 + count_MP))
        return loss_MP

    def _query_passage(self) -> tuple[Sums, Sums]:
        want = ["row"] + ["column"] * self.wants_columns
        want += [f"{axis}_total" for axis in want] if self.wants_totals else []
        limits = None
        if self.row_limit_MB is not None:
            limits = Limits(self.row_limit_MB, self.column_limit_MN, *self._guide("query"))
        given = self.q_BD, self.p_ND, self.t.relatives_BK, limits
        sums = self._sums(*given, want, self._row_gradient())
        if self.wants_columns:  # a column has cells on every rank
            all_RMN = self.ranks.gather_rows(sums.column_MN[None])
            sums.column_MN = log_sum(all_RMN)
            if self.wants_totals:
                sums.column_total_MN = self.ranks.gather_rows(sums.column_total_MN[None]).sum(0)
                sums.column_count_MN = self.ranks.gather_rows(sums.column_count_MN[None]).sum(0)
        columns = Sums(
            row_MB=sums.column_MN,
            row_total_MB=sums.column_total_MN,
            row_count_MB=sums.column_count_MN,
        )
        return sums, columns

    def _row_gradient(self) -> RowGradient | None:
        """The loss's gradient by a row's sum, up to a factor of the whole loss, where it is known
        before the loss is: one positive a query and nothing else in its softmax. A kernel that is
        told spares a pass; one that is told wrong finds out."""
        c, t = self.c, self.t
        is_plain = c.negatives == ["query_passage"] and not (c.symmetric or c.hardness)
        is_plain = is_plain and not self.wants_totals and len(t.pair_query_P) == len(self.q_BD)
        if not is_plain or c.backend != "triton":
            return None
        z_MP, at_P = self.z_MP.detach(), t.pair_query_P
        z_MB = torch.zeros_like(z_MP).scatter(1, at_P.expand_as(z_MP), z_MP)
        weight_B = torch.zeros_like(z_MP[0]).scatter(0, at_P, t.pair_weight_P.to(z_MP))

        def foretell(m: int, lo: int, hi: int, row_c: Tensor) -> Tensor:
            return torch.sigmoid(row_c - z_MB[m, lo:hi]) * weight_B[lo:hi]

        return foretell

    def _query_query(self) -> Sums:
        if self.t.query_relatives_BK is None:
            raise ValueError(
                "query_query negatives need Targets.query_relatives_BK: which queries are never"
                " negatives of which (Batches(..., query_relatives=True))"
            )
        q_AD = self.ranks.gather_rows(self.q_BD)
        limits = None
        if self.row_limit_MB is not None:
            own_BE, _ = self._guide("query")
            all_AE = None if own_BE is None else self.t.guide_query_AE
            limits = Limits(self.row_limit_MB, None, own_BE, all_AE)
        return self._sums(self.q_BD, q_AD, self.t.query_relatives_BK, limits)

    def _passage_passage(self) -> "_Part":
        rows_P, of_P = self.t.pair_passage_P, self.t.pair_query_P
        limits = None
        if self.row_limit_MB is not None:
            limits = Limits(self.row_limit_MB[:, of_P], None, *self._guide("passage"))
        p_PD = rows_of(self.p_ND, rows_P)
        sums = self._sums(p_PD, self.p_ND, self.t.relatives_BK[of_P], limits)
        return _Part(sums.row_MB, sums.row_total_MB, sums.row_count_MB)

    def _sums(
        self,
        x_nD: Tensor,
        y_ND: Tensor,
        relatives_nK: Tensor,
        limits: Limits | None,
        want: Sequence[str] | None = None,
        row_gradient: RowGradient | None = None,
    ) -> Sums:
        want = want or ["row"] + ["row_total"] * self.wants_totals
        sums = similarity_sums(
            x_nD, y_ND, self.steeper, dims=self.dims, relatives_BK=relatives_nK, limits=limits,
            want=want, backend=self.c.backend, path=self.c.path, row_gradient=row_gradient,
        )  # fmt: skip
        if self.shrink is not None:
            sums.row_MB = _ScaleGradient.apply(sums.row_MB, self.shrink)
            if sums.column_MN is not None:
                sums.column_MN = _ScaleGradient.apply(sums.column_MN, self.shrink)
        return sums

    def _guide(self, side: str) -> tuple[Tensor | None, Tensor | None]:
        """The guide's embeddings of rows (own queries or pairs' passages) and candidates."""
        t = self.t
        if self.c.guide is None:
            return None, None
        if side == "passage":
            return t.guide_passage_NE[t.pair_passage_P], t.guide_passage_NE
        own = slice(t.query_offset, t.query_offset + len(self.q_BD))
        return t.guide_query_AE[own], t.guide_passage_NE

    @torch.no_grad()
    def _find_limits(self) -> None:
        """row_limit_MB and column_limit_MN from the best positive of each query and passage."""
        c, t = self.c, self.t
        self.row_limit_MB = self.column_limit_MN = None
        if c.false_negative_margin is None and c.false_negative_ratio is None:
            return
        if c.guide is None:
            cosine_MP = self.z_MP / self.scale
        else:
            own_BE, all_NE = self._guide("query")
            cosine_MP = (own_BE[t.pair_query_P] * all_NE[t.pair_passage_P]).sum(1)[None]
        limits_MP = []
        if c.false_negative_margin is not None:
            limits_MP.append(cosine_MP + c.false_negative_margin)
        if c.false_negative_ratio is not None:
            limits_MP.append(cosine_MP * c.false_negative_ratio)
        limit_MP = torch.stack(limits_MP).amin(0)
        self.row_limit_MB = _best(limit_MP, t.pair_query_P, len(self.q_BD))
        if self.wants_columns:
            column_MN = _best(limit_MP, t.pair_passage_P, len(self.p_ND))
            self.column_limit_MN = self.ranks.gather_rows(column_MN[None]).amax(0)


def log_sum(x_kMn: Tensor) -> Tensor:
    """Log of the sum of e^x over the first axis; that of an empty sum is -inf and its gradient 0,
    where torch.logsumexp's is nan."""
    is_empty_Mn = (x_kMn == -math.inf).all(0)
    sum_Mn = torch.logsumexp(x_kMn.masked_fill(is_empty_Mn, 0.0), 0)
    return sum_Mn.masked_fill(is_empty_Mn, -math.inf)


@dataclass
class _Part:
    """One kind of negatives of every pair: log-sum, and sum and number of z where asked for."""

    log_MP: Tensor
    total_MP: Tensor | None = None
    count_MP: Tensor | None = None


def _at(sums: Sums, index_P: Tensor) -> _Part:
    values = (sums.row_MB, sums.row_total_MB, sums.row_count_MB)
    return _Part(*(None if x is None else x[:, index_P] for x in values))


def _best(limit_MP: Tensor, index_P: Tensor, size: int) -> Tensor:
    """Largest limit of the pairs of each row, (M, size); -inf where it has none: nobody asks."""
    best_Mn = limit_MP.new_full((len(limit_MP), size), -math.inf)
    return best_Mn.scatter_reduce_(1, index_P.expand_as(limit_MP), limit_MP, "amax")


def _debiased(ln_MP: Tensor, z_MP: Tensor, count_MP: Tensor, share: float, scale: Tensor) -> Tensor:
    """Log of the estimated sum over true negatives, in log space throughout."""
    expected_MP = z_MP + (share * count_MP).log()
    # where the difference is not positive the floor is taken; -1 keeps nan out of its gradient
    excess_MP = torch.where(ln_MP > expected_MP, expected_MP - ln_MP, -1.0)
    estimate_MP = ln_MP + torch.log(-torch.expm1(excess_MP)) - math.log(1 - share)
    floor_MP = count_MP.log() - scale
    is_estimated_MP = (ln_MP > expected_MP) & (estimate_MP > floor_MP)
    return torch.where(is_estimated_MP, estimate_MP, floor_MP)


def _divergence(
    c: LossConfig, q_BD: Tensor, p_ND: Tensor, t: Targets, dims: list[int], scale: Tensor
) -> Tensor:
    """This rank's share of the mean KL(teacher || model) over all candidates, (M,)."""
    own = slice(t.query_offset, t.query_offset + len(q_BD))
    teacher = Teacher(t.guide_query_AE[own], t.guide_passage_NE, c.teacher_divisor)
    sums = similarity_sums(
        q_BD, p_ND, scale, dims=dims, teacher=teacher, want=("row", "soft"), backend=c.backend
    )
    kl_MB = sums.row_MB - sums.soft_MB - sums.entropy_B
    weight_B = kl_MB.new_zeros(len(q_BD)).index_add(
        0, t.pair_query_P, t.pair_weight_P.to(kl_MB.dtype)
    )
    return (kl_MB * weight_B).sum(1) / t.num_examples


class _ScaleGradient(torch.autograd.Function):
    """x, with its gradient multiplied."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (factor,) = ctx.saved_tensors
        return grad * factor, None
