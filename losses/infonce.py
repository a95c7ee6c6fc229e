"""InfoNCE in plain torch: the specification that every faster form is tested against.

Shapes: B queries, N candidate passages (positives and negatives of all queries), D embedding, P
(query, positive)
pairs, K known relatives of a query at most.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import LossConfig


@dataclass
class Targets:
    """Which candidates answer which query. Columns number the candidates of all ranks.

    pair_query_P    row of q_BD, int64; a query with several positives owns several pairs
    pair_passage_P  column of p_ND that answers it, int64
    pair_weight_P   share of the pair in the sum, float32: 1 / positives of its example
    relatives_BK    columns that are never negatives of the query (all its known positives, texts
                    equal to it or to
                    them), int64, padded with -1
    num_examples    examples of all ranks: the divisor of the mean
    """

    pair_query_P: Tensor
    pair_passage_P: Tensor
    pair_weight_P: Tensor
    relatives_BK: Tensor
    num_examples: int


def infonce(
    q_BD: Tensor,
    p_ND: Tensor,
    targets: Targets,
    *,
    temperature: float | Tensor,
    symmetric: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean InfoNCE loss in nats, and the scores (B, N) it was computed from.

    For a pair (b, j):  softplus(log sum_{n negative of b} exp(z_bn) - z_bj)  with  z = q.p /
                        temperature,
    which equals -log softmax over j and the negatives of b; other positives of b are in neither.
    q_BD, p_ND   unit-norm embeddings of any float dtype; scores are computed in float32 (float64
                 for float64)
    temperature  > 0
    symmetric    weight s of the passage-to-query direction: (1 - s) rows + s columns; a query is no
                 negative of a
                 passage that is its relative
    Raises ValueError when shapes disagree or the temperature is not positive.
    Source: van den Oord et al. 2018, eq. 4; in-batch form as in Karpukhin et al. 2020, sec. 3.2;
    the positive is kept
    out of the sum so that neither loss nor gradient cancels (docs/numerics.md).
    """
    if q_BD.ndim != 2 or p_ND.ndim != 2 or q_BD.shape[1] != p_ND.shape[1]:
        raise ValueError(
            f"infonce: q {tuple(q_BD.shape)}, p {tuple(p_ND.shape)}; want (B, D), (N, D)"
        )
    if len(targets.relatives_BK) != len(q_BD):
        raise ValueError(
            f"infonce: relatives of {len(targets.relatives_BK)} queries, want {len(q_BD)}"
        )
    if float(temperature) <= 0:
        raise ValueError(f"infonce: temperature must be > 0, got {float(temperature)}")
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    with torch.autocast(q_BD.device.type, enabled=False):
        scores_BN = (q_BD.to(wide) @ p_ND.to(wide).T) / temperature
        row_R, slot_R = (targets.relatives_BK >= 0).nonzero(as_tuple=True)
        column_R = targets.relatives_BK[row_R, slot_R]
        nothing = scores_BN.new_tensor(-math.inf)
        negatives_BN = scores_BN.index_put((row_R, column_R), nothing)
        positive_P = scores_BN[targets.pair_query_P, targets.pair_passage_P]
        loss_P = _softplus(torch.logsumexp(negatives_BN, 1)[targets.pair_query_P] - positive_P)
        if symmetric:
            column_P = torch.logsumexp(negatives_BN, 0)[targets.pair_passage_P]
            loss_P = (1 - symmetric) * loss_P + symmetric * _softplus(column_P - positive_P)
        loss = (loss_P * targets.pair_weight_P).sum() / targets.num_examples
    return loss, scores_BN


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # torch's default of 20 is 2e-9 off: visible in float64


class InfoNCE(nn.Module):
    """InfoNCE over one or several Matryoshka dims, with a fixed or learned temperature.

    The loss is the weighted mean over dims: it stays in nats whatever the weights. Source of the
    prefix form:
    Kusupati et al. 2022, eq. 1; prefixes are normalised again.
    """

    def __init__(self, c: LossConfig):
        super().__init__()
        self.dims, self.symmetric = list(c.dims), c.symmetric
        self.dim_weights = list(c.dim_weights) or [1.0] * len(c.dims)
        self.bounds = (math.log(c.temperature_min), math.log(c.temperature_max))
        log_temperature = torch.tensor(math.log(c.temperature))
        if c.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> Tensor:
        return (
            self.log_temperature.clamp(*self.bounds).exp()
            if self._learned
            else self.log_temperature.exp()
        )

    @property
    def _learned(self) -> bool:
        return isinstance(self.log_temperature, nn.Parameter)

    def forward(
        self, q_BD: Tensor, p_ND: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {"diagonal", "mean_similarity"}): mean score of the pairs and of all cells,
        divided by temperature,
        at the widest dim."""
        D = q_BD.shape[1]
        dims = self.dims or [D]
        weights = self.dim_weights or [1.0]
        total, aux = q_BD.new_zeros((), dtype=torch.promote_types(q_BD.dtype, torch.float32)), {}
        for dim, weight in zip(dims, weights, strict=True):
            q_Bd, p_Nd = q_BD, p_ND
            if dim < D:
                q_Bd, p_Nd = F.normalize(q_BD[:, :dim], dim=-1), F.normalize(p_ND[:, :dim], dim=-1)
            loss, scores_BN = infonce(
                q_Bd, p_Nd, targets, temperature=self.temperature, symmetric=self.symmetric
            )
            total = total + loss * (weight / sum(weights))
            if dim == max(dims):
                with torch.no_grad():
                    pairs_P = scores_BN[targets.pair_query_P, targets.pair_passage_P]
                    aux = {"diagonal": pairs_P.mean(), "mean_similarity": scores_BN.mean()}
        return total, aux
