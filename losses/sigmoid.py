"""The pairwise sigmoid loss: every cell is a question of its own, and no softmax couples them.

Shapes: B queries of this rank, N candidate passages of all ranks, D embedding, M Matryoshka dims.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import LossConfig
from losses.infonce import InfoNCE, Targets, dims_of_step, mean_scores
from losses.similarity import positive_scores, similarity_sums
from runtime.distributed import SINGLE, Ranks


class Sigmoid(InfoNCE):
    """-(sum over pairs of weight * log sigmoid(z + bias) + sum over negatives of log sigmoid(-z -
    bias)) / examples of all ranks, with z = cosine / temperature; relatives are in neither sum.

    The bias is learned; it starts far below 0, because almost every cell is a negative.
    Source: Zhai et al. 2023 (SigLIP), eq. 1 and sec. 3.2.
    """

    def __init__(self, c: LossConfig, seed: int = 0, operands: torch.dtype | None = None):
        super().__init__(c, seed, operands)
        self.bias = nn.Parameter(torch.tensor(c.sigmoid_bias))

    def forward(
        self, q_BD: Tensor, p_ND: Tensor, targets: Targets, ranks: Ranks = SINGLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss, and of InfoNCE's numbers and the bias."""
        dims, weight_M = dims_of_step(self.c, q_BD.shape[1], self.seed, targets.step)
        scale = 1 / self.temperature
        q_BD, p_ND = self.rounded(q_BD), self.rounded(p_ND)
        pairs = targets.pair_query_P, targets.pair_passage_P
        z_MP = positive_scores(q_BD, p_ND, scale, *pairs, dims=dims)
        pair_MP = F.softplus(-z_MP - self.bias, threshold=40)  # 20, the default: 2e-9 off
        positive_M = (pair_MP * targets.pair_weight_P).sum(1)
        sums = similarity_sums(
            q_BD, p_ND, scale, dims=dims, relatives_BK=targets.relatives_BK, want=("softplus",),
            bias=self.bias, backend=self.c.backend, path=self.c.path,
        )  # fmt: skip
        loss_M = (positive_M + sums.softplus_MB.sum(1)) / targets.num_examples
        numbers = mean_scores(q_BD, p_ND, targets, max([*self.c.dims, *dims]), scale)
        numbers["bias"] = self.bias.detach() / ranks.size
        return (loss_M * weight_M.to(loss_M)).sum(), numbers
